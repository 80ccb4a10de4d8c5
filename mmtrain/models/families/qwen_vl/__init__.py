"""Qwen-VL and Qwen-VL-Chat of 2023, built here: transformers has never had them.

ViT-bigG, a resampler that makes 256 features of any image, and the Qwen-7B decoder, all under
the names of the published weights, with its fused projections kept. The token embeddings and the
head are components of their own, because the released fine-tuning code trains them in full; the
resampler's fixed positions are one because it trains nothing there: `full` on the connector leaves
them as they are. `full` on the LLM is its layers and last norm.

Text stays text, whatever it spells, where the original makes control tokens of `<ref>`, `<box>`,
`<quad>`, their ends and all others. `model.grounding_tokens: true` makes control tokens of these
six, and of no others, in questions and answers: for grounding data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.models.interface import (
    AttentionShape,
    Batch,
    BatchSize,
    DefaultRoles,
    Example,
    ForwardResult,
    LoadedModel,
    ModelOptions,
    ProcessorCode,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from mmtrain.tasks.interface import Rendered

_LLM_LAYER = r"transformer\.h\.(?P<layer>\d+)"
_VISION_BLOCK = r"transformer\.visual\.transformer\.resblocks\.(?P<layer>\d+)"
_QWEN_VL_CHAT = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    seq_length=2048,
    visual=dict(
        heads=16,
        image_size=448,
        image_start_id=151857,
        layers=48,
        mlp_ratio=4.9231,
        output_dim=4096,
        patch_size=14,
        width=1664,
    ),
)
_TINY = dict(
    vocab_size=704,
    hidden_size=96,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_channels=24,
    seq_length=2048,
    visual=dict(
        heads=4,
        image_size=32,
        image_start_id=662,
        layers=2,
        mlp_ratio=2.0,
        output_dim=96,
        patch_size=4,
        width=64,
        n_queries=16,
    ),
)


class QwenVL:
    """The family plug-in."""

    presets: Mapping[str, Mapping[str, Any]] = {"qwen-vl-chat": _QWEN_VL_CHAT, "tiny": _TINY}
    model_types = ("qwen",)
    own_options: tuple[str, ...] = ("grounding_tokens",)
    default_max_length = 2048  # beyond it the base extrapolates
    components: Mapping[str, tuple[str, ...]] = {
        "vision": (r"transformer\.visual\.(?!attn_pool\.|ln_post\.|proj$).*",),
        "connector": (
            r"transformer\.visual\.attn_pool\.(?!pos_embed$).*",
            r"transformer\.visual\.(ln_post\..*|proj)",
        ),
        "connector_positions": (r"transformer\.visual\.attn_pool\.pos_embed",),
        "llm": (r"transformer\.(h|ln_f)\..*",),
        "embeddings": (r"transformer\.wte\..*",),
        "head": (r"lm_head\..*",),
    }
    sublayers = {
        "llm": {
            "attn": {"qkv": rf"{_LLM_LAYER}\.attn\.c_attn", "o": rf"{_LLM_LAYER}\.attn\.c_proj"},
            "mlp": {
                "gate": rf"{_LLM_LAYER}\.mlp\.w2",
                "up": rf"{_LLM_LAYER}\.mlp\.w1",
                "down": rf"{_LLM_LAYER}\.mlp\.c_proj",
            },
        },
        "vision": {
            "attn": {
                "qkv": rf"{_VISION_BLOCK}\.attn\.in_proj",
                "o": rf"{_VISION_BLOCK}\.attn\.out_proj",
            },
            "mlp": {
                "up": rf"{_VISION_BLOCK}\.mlp\.c_fc",
                "down": rf"{_VISION_BLOCK}\.mlp\.c_proj",
            },
        },
    }
    # The released fine-tuning code leaves mlp.c_proj out.
    default_roles: DefaultRoles = {
        "lora": {"llm": {"attn": ("qkv", "o"), "mlp": ("gate", "up")}},
    }

    def model_config(self, options: ModelOptions) -> Any:
        """The configuration of a checkpoint folder or of a preset."""
        from mmtrain.models.families.qwen_vl import configuration

        return configuration.read_config(options, self.presets)

    def skeleton(self, config: Any) -> nn.Module:
        """The module tree on the current default device, weights unset."""
        from transformers.initialization import no_init_weights

        from mmtrain.models.families.qwen_vl.decoder import QWenLMHeadModel

        with no_init_weights():
            return QWenLMHeadModel(config)

    def load(self, options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
        """Build and fill the base; a preset gets keyed random weights."""
        from mmtrain.models import building
        from mmtrain.models.families.qwen_vl import processing

        config = self.model_config(options)
        processor, sources = None, []
        if options.checkpoint is not None:
            folder = Path(options.checkpoint)
            processor = processing.load_processor(folder, config, options.grounding_tokens)
            sources = [(folder, weight_name)]
        model = building.build_empty(self.skeleton, config, options.dtype, zero3_config)
        files = building.fill(model, sources, options)
        if not files or options.allow_reinit:
            self.set_fixed_positions(model)
        return LoadedModel(model, processor, config, files, standard_folder=False)

    def set_fixed_positions(self, model: Any) -> None:
        """Give the resampler its positions, which are computed, where none were stored."""
        from mmtrain.distributed import full_shape, write_parameter
        from mmtrain.models.families.qwen_vl.visual import sine_positions

        parameter = model.transformer.visual.attn_pool.pos_embed
        write_parameter(parameter, sine_positions(*full_shape(parameter)))

    def attention(self, config: Any, component: str) -> AttentionShape:
        """The attention shape of `llm` or `vision`."""
        from mmtrain.models.families.qwen_vl import configuration

        return configuration.attention_shape(config, component)

    def image_tokens(self, config: Any, component: str) -> int:
        """Patches in the tower, the resampler's queries in the LLM."""
        from mmtrain.models.families.qwen_vl import configuration

        return configuration.image_tokens(config, component)

    def encode(
        self,
        processor: Any,
        sample_id: str,
        rendered: Rendered,
        images: Sequence[Image],
        max_length: int,
        truncation_side: str,
    ) -> Example:
        """Tokenise in the published chat form, images before the first question."""
        from mmtrain.models import text
        from mmtrain.models.families.qwen_vl import encoding

        turns = text.conversation(rendered)
        return encoding.encode(processor, sample_id, turns, images, max_length, truncation_side)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Right-pad; a batch without any image carries a blank one that nothing reads."""
        from mmtrain.models.families.qwen_vl import encoding

        return encoding.collate(examples, processor)

    def planned_batch(self, config: Any, size: BatchSize) -> Batch:
        """A batch of this size, to measure what it costs."""
        from mmtrain.models.families.qwen_vl import encoding

        return encoding.planned_batch(config, size)

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        """Tower, resampler and LLM once each, whatever the batch holds."""
        from mmtrain.models.families.qwen_vl import computing

        return computing.forward(model, batch)

    def generate(
        self, model: nn.Module, processor: Any, examples: Sequence[Example], settings: Any
    ) -> list[str]:
        """Answers, all prompts in one left-padded batch with a KV cache."""
        from mmtrain.models.families.qwen_vl import computing

        return computing.generate(model, processor, examples, settings)

    def processor_code(self, options: ModelOptions) -> ProcessorCode | None:
        """transformers has no class for these folders."""
        return None

    def write_tiny(
        self, folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny"
    ) -> None:
        """A tiny checkpoint in the published layout, its tokenizer trained on `texts`."""
        from mmtrain.models.families.qwen_vl import tiny_model

        config = self.model_config(ModelOptions(None, preset=preset, dtype="fp32"))
        tiny_model.write(self, config, texts, seed, folder)

    def save(
        self,
        model: nn.Module,
        processor: Any,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        """The published layout, with weights as safetensors."""
        from mmtrain.models import building

        building.save_folder(model.config, processor, state, folder)


def weight_name(stored: str) -> str:
    """The module tree has the published names."""
    return stored


FAMILY = QwenVL()
