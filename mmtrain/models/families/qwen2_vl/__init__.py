"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own resolution, and positions in three
dimensions; the vision merger is the connector.

Which generation a checkpoint is of, its `model_type` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.models.families.qwen2_vl.presets import PRESETS
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

_LLM_LAYER = r"model\.language_model\.layers\.(?P<layer>\d+)"
_VISION_BLOCK = r"model\.visual\.blocks\.(?P<layer>\d+)"
# The published Qwen2 folders keep tower and LLM side by side; Qwen3's need no renaming.
_RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)
_NOT_WEIGHTS = re.compile(r"\.(original_)?inv_freq$")


def rename(stored: str) -> str | None:
    """A stored tensor's name in today's module tree; None for what is no weight."""
    if _NOT_WEIGHTS.search(stored):
        return None
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored


class Qwen2VL:
    """The family plug-in."""

    presets: Mapping[str, Mapping[str, Any]] = PRESETS
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    own_options: tuple[str, ...] = ("max_pixels",)
    # An image of a million pixels makes about 1300 tokens; the rest is for the text.
    default_max_length = 2048
    components: Mapping[str, tuple[str, ...]] = {
        "vision": (r"model\.visual\.(?!merger\.|deepstack_merger_list\.).*",),
        "connector": (r"model\.visual\.(merger|deepstack_merger_list)\..*",),
        "llm": (r"model\.language_model\..*", r"lm_head\..*"),
    }
    sublayers = {
        "llm": {
            "attn": {role: rf"{_LLM_LAYER}\.self_attn\.{role}_proj" for role in "qkvo"},
            "mlp": {role: rf"{_LLM_LAYER}\.mlp\.{role}_proj" for role in ("gate", "up", "down")},
        },
        "vision": {
            "attn": {"qkv": rf"{_VISION_BLOCK}\.attn\.qkv", "o": rf"{_VISION_BLOCK}\.attn\.proj"},
            "mlp": {
                "gate": rf"{_VISION_BLOCK}\.mlp\.gate_proj",
                "up": rf"{_VISION_BLOCK}\.mlp\.(?:fc1|up_proj|linear_fc1)",
                "down": rf"{_VISION_BLOCK}\.mlp\.(?:fc2|down_proj|linear_fc2)",
            },
        },
    }
    default_roles: DefaultRoles = {}

    def model_config(self, options: ModelOptions) -> Any:
        """The configuration of a checkpoint folder or of a preset."""
        from mmtrain.models.families.qwen2_vl import shapes

        return shapes.read_config(options, self.presets)

    def skeleton(self, config: Any) -> nn.Module:
        """The module tree on the current default device, weights unset."""
        from transformers.initialization import no_init_weights

        from mmtrain.models.families.qwen2_vl import computing, shapes

        model_class = shapes.transformers_class(config.model_type, "ForConditionalGeneration")
        with no_init_weights():
            model = model_class(config)
            # As the smaller published models ask for; without initialisation nothing has done it.
            model.tie_weights()
        llm = model.model.language_model
        if hasattr(llm, "_deepstack_process"):
            setattr(llm, "_deepstack_process", computing.add_deep_features)
        return model

    def load(self, options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
        """Build and fill the base; a preset gets keyed random weights."""
        from mmtrain.models import building
        from mmtrain.models.families.qwen2_vl import processing

        config = self.model_config(options)
        processor, sources = None, []
        if options.checkpoint is not None:
            folder = Path(options.checkpoint)
            processor = processing.load_processor(folder, config, options.max_pixels)
            sources = [(folder, rename)]
        model = building.build_empty(self.skeleton, config, options.dtype, zero3_config)
        files = building.fill(model, sources, options)
        return LoadedModel(model, processor, config, files)

    def attention(self, config: Any, component: str) -> AttentionShape:
        """The attention shape of `llm` or `vision`."""
        from mmtrain.models.families.qwen2_vl import shapes

        return shapes.attention_shape(config, component)

    def image_tokens(self, config: Any, component: str) -> int:
        """Of a square image of 448 pixels: images keep their own size here."""
        from mmtrain.models.families.qwen2_vl import shapes

        return shapes.image_tokens(config, component)

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
        from mmtrain.models.families.qwen2_vl import encoding

        turns = text.conversation(rendered)
        return encoding.encode(processor, sample_id, turns, images, max_length, truncation_side)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Right-pad; a batch without any image carries a blank one that nothing reads."""
        from mmtrain.models.families.qwen2_vl import batches

        return batches.collate(examples, processor)

    def planned_batch(self, config: Any, size: BatchSize) -> Batch:
        """A batch of this size, to measure what it costs."""
        from mmtrain.models.families.qwen2_vl import batches

        return batches.planned_batch(config, size)

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        """Tower, merger and LLM once each, whatever the batch holds."""
        from mmtrain.models.families.qwen2_vl import computing

        return computing.forward(model, batch)

    def generate(
        self, model: nn.Module, processor: Any, examples: Sequence[Example], settings: Any
    ) -> list[str]:
        """Answers, all prompts in one left-padded batch with a KV cache."""
        from mmtrain.models.families.qwen2_vl import computing

        return computing.generate(model, processor, examples, settings)

    def processor_code(self, options: ModelOptions) -> ProcessorCode | None:
        """In two parts: transformers' processor of both asks for torchvision, for its videos."""
        cap = f", max_pixels={options.max_pixels}" if options.max_pixels else ""
        return ProcessorCode(
            ("AutoImageProcessor", "AutoTokenizer"),
            (
                "tokenizer = AutoTokenizer.from_pretrained(base)",
                "image_processor = AutoImageProcessor.from_pretrained(",
                f'    base, backend="pil"{cap}',
                ")",
            ),
        )

    def write_tiny(
        self, folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny"
    ) -> None:
        """A tiny checkpoint: real classes, a tokenizer trained on `texts`, a real processor."""
        from mmtrain.models.families.qwen2_vl import tiny_model

        config = self.model_config(ModelOptions(None, preset=preset, dtype="fp32"))
        tiny_model.write(self, config, texts, seed, folder)

    def save(
        self,
        model: nn.Module,
        processor: Any,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        """A standard Hugging Face folder with these tensors."""
        from mmtrain.models import building

        building.save_folder(model.config, processor, state, folder)


FAMILY = Qwen2VL()
