"""LLaVA-1.5 and ShareGPT4V: CLIP ViT-L/14-336, a two-layer projector, Vicuna.

The conversation is vicuna_v1, the turn behind an image is stripped and images are padded to
squares, as the published models were trained; written folders make transformers do the same.
LLaVA's own code leaves out of the loss what it cannot cut (its `tokenization mismatch`: an empty
answer, or `ASSISTANT:` inside a question); here the loss falls on such an answer and its end, too.

Folders are those of transformers, or of LLaVA's own code. A `tokenizer.model` without
tokenizer.json is cut as sentencepiece cuts it, and as `legacy` in tokenizer_config.json says:
`false` puts no space before the text behind `</s>`. Where nothing is said it is `true`, as for the
published code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError
from mmtrain.models.families.llava.features import embed, tokens_per_image, vision_features
from mmtrain.models.families.llava.layouts import rename
from mmtrain.models.families.llava.prompts import IMAGE_TOKEN, SYSTEM
from mmtrain.models.families.llava.shapes import PRESETS
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

    from mmtrain.models.weights import WeightFolder
    from mmtrain.tasks.interface import Rendered

__all__ = [
    "FAMILY",
    "IMAGE_TOKEN",
    "SYSTEM",
    "embed",
    "rename",
    "tokens_per_image",
    "vision_features",
]

_LLM_LAYER = r"model\.language_model\.layers\.(?P<layer>\d+)"
_CLIP_LAYER = r"model\.vision_tower\.encoder\.layers\.(?P<layer>\d+)"


class Llava:
    """The family plug-in."""

    presets = PRESETS
    model_types = ("llava", "llava_llama", "share4v")
    own_options: tuple[str, ...] = ("vision_tower",)
    default_max_length = 2048
    components: Mapping[str, tuple[str, ...]] = {
        "vision": (r"model\.vision_tower\..*",),
        "connector": (r"model\.multi_modal_projector\..*",),
        "llm": (r"model\.language_model\..*", r"lm_head\..*"),
    }
    sublayers = {
        "llm": {
            "attn": {role: rf"{_LLM_LAYER}\.self_attn\.{role}_proj" for role in "qkvo"},
            "mlp": {role: rf"{_LLM_LAYER}\.mlp\.{role}_proj" for role in ("gate", "up", "down")},
        },
        "vision": {
            "attn": {role: rf"{_CLIP_LAYER}\.self_attn\.{role}_proj" for role in "qkv"}
            | {"o": rf"{_CLIP_LAYER}\.self_attn\.out_proj"},
            "mlp": {"up": rf"{_CLIP_LAYER}\.mlp\.fc1", "down": rf"{_CLIP_LAYER}\.mlp\.fc2"},
        },
    }
    default_roles: DefaultRoles = {}

    def model_config(self, options: ModelOptions) -> Any:
        """The configuration of a checkpoint folder or of a preset."""
        from transformers import LlavaConfig

        from mmtrain.models import configuration
        from mmtrain.models.families.llava import original

        config: Any
        if options.checkpoint is None:
            config = LlavaConfig(**dict(self.presets[str(options.preset)]))
        else:
            folder = Path(options.checkpoint)
            stored = configuration.stored_config(folder, self.model_types)
            refuse_tiled_images(folder, stored)
            if original.is_original(stored):
                config = original.original_config(stored, options)
            else:
                config = configuration.parsed(LlavaConfig, stored, folder)
        text, vision = config.text_config, config.vision_config
        parts = {"llm": text, "vision": vision}
        configuration.set_working_precision(config, parts, options)
        configuration.apply_overrides(parts, options)
        configuration.settle_attention_dropout(parts.values(), options)
        return config

    def skeleton(self, config: Any) -> nn.Module:
        """The module tree on the current default device, weights unset."""
        from transformers import LlavaForConditionalGeneration
        from transformers.initialization import no_init_weights

        with no_init_weights():
            return LlavaForConditionalGeneration(config)

    def load(self, options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
        """Build and fill the base; a preset gets keyed random weights."""
        from mmtrain.models import building

        config = self.model_config(options)
        opened = Opened(None, [], True)
        if options.checkpoint is not None:
            opened = open_folder(options, config, self.model_types)
        model = building.build_empty(self.skeleton, config, options.dtype, zero3_config)
        files = building.fill(model, opened.sources, options)
        return LoadedModel(model, opened.processor, config, files, opened.is_standard)

    def attention(self, config: Any, component: str) -> AttentionShape:
        """The attention shape of `llm` or `vision`."""
        part = config.text_config if component == "llm" else config.vision_config
        heads = part.num_attention_heads
        kv_heads = getattr(part, "num_key_value_heads", None) or heads
        layers, hidden = part.num_hidden_layers, part.hidden_size
        return AttentionShape(layers, heads, kv_heads, hidden // heads, hidden)

    def image_tokens(self, config: Any, component: str) -> int:
        """The class token is one more in the tower."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + 1 if component == "vision" else tokens_per_image(config)

    def encode(
        self,
        processor: Any,
        sample_id: str,
        rendered: Rendered,
        images: Sequence[Image],
        max_length: int,
        truncation_side: str,
    ) -> Example:
        """Tokenise in the vicuna_v1 form, images before the first question."""
        from mmtrain.models import text
        from mmtrain.models.dropout import stable_hash
        from mmtrain.models.families.llava import prompts
        from mmtrain.models.families.llava.images import pixel_values

        turns = text.conversation(rendered)
        control_tokens = processor.tokenizer.all_special_tokens
        text.refuse_control_tokens(control_tokens, sample_id, (said for _, said in turns))
        pieces = prompts.pieces(turns, len(images), processor.image_gap)
        ids, labels = text.tokenise(processor.tokenizer, pieces)
        token_id = processor.image_token_id
        ids, labels = text.expand(ids, labels, token_id, processor.tokens_per_image)
        ids, labels = text.truncate(
            ids, labels, token_id, max_length, truncation_side, sample_id, processor.num_cue_tokens
        )
        pixels = pixel_values(processor.image_processor, images)
        return Example(sample_id, stable_hash(sample_id), ids, labels, pixels)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Right-pad; a batch without any image carries a blank one that nothing reads."""
        from mmtrain.models import batching
        from mmtrain.models.answers import answer_targets

        size = processor.image_processor.crop_size
        tensors = batching.text_tensors(examples)
        tensors |= batching.image_tensors(examples, size["height"], size["width"])
        targets = answer_targets(examples, tensors["input_ids"].shape[1])
        return batching.make_batch(examples, tensors, targets)

    def planned_batch(self, config: Any, size: BatchSize) -> Batch:
        """A batch of this size, to measure what it costs."""
        from types import SimpleNamespace

        import torch

        from mmtrain.models.batching import planned_examples

        side = config.vision_config.image_size
        cutter = SimpleNamespace(crop_size={"height": side, "width": side})
        image = [config.image_token_id] * self.image_tokens(config, "llm")
        examples = planned_examples(size, image, torch.zeros(3, side, side), {})
        return self.collate(examples, SimpleNamespace(image_processor=cutter))

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        """Tower, projector and LLM once each, whatever the batch holds."""
        from mmtrain.models.answers import answer_loss
        from mmtrain.models.dropout import scope_of

        tensors = batch.tensors
        scope = scope_of(model)
        scope.set_rows("vision", tensors["image_keys"])
        scope.set_rows("connector", tensors["image_keys"])
        scope.set_rows("llm", tensors["row_keys"])
        embeds = embed(model, tensors["input_ids"], tensors["pixel_values"])
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=tensors["attention_mask"], use_cache=False
        ).last_hidden_state
        return answer_loss(hidden, model.lm_head, tensors, batch.num_answer_tokens)

    def generate(
        self, model: nn.Module, processor: Any, examples: Sequence[Example], settings: Any
    ) -> list[str]:
        """Answers, all prompts in one left-padded batch with a KV cache."""
        from mmtrain.models.batching import pad_ids
        from mmtrain.models.building import generate_from_embeddings
        from mmtrain.models.text import prompt_ids

        prompts = [prompt_ids(example.input_ids, example.labels) for example in examples]
        input_ids, attention_mask = pad_ids(prompts, "left")
        device = next(model.parameters()).device
        batch = self.collate(examples, processor).to(device)
        embeds = embed(model, input_ids.to(device), batch.tensors["pixel_values"])
        return generate_from_embeddings(
            model, processor.tokenizer, embeds, attention_mask.to(device), settings
        )

    def processor_code(self, options: ModelOptions) -> ProcessorCode | None:
        """Published folders would have the sides of wide images cut off."""
        return ProcessorCode(
            ("AutoProcessor", "LlavaImageProcessor"),
            (
                "processor = AutoProcessor.from_pretrained(base)",
                "# Images are padded to squares, as in training.",
                "images = LlavaImageProcessor.from_pretrained(base, do_pad=True)",
                "processor.image_processor = images",
            ),
        )

    def write_tiny(
        self, folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny"
    ) -> None:
        """A tiny checkpoint: real classes, a tokenizer trained on `texts`, a real processor."""
        from mmtrain.models import tiny

        config = self.model_config(ModelOptions(None, preset=preset, dtype="fp32"))
        tokenizer = tiny.train_tokenizer([SYSTEM, " USER: ASSISTANT:", *texts], IMAGE_TOKEN)
        config.text_config.vocab_size = len(tokenizer)
        config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config.image_token_id = config.image_token_index
        tiny.write_llava_folder(self, config, tokenizer, folder, seed)

    def save(
        self,
        model: nn.Module,
        processor: Any,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        """A standard Hugging Face folder, its vocabulary padded if it lacks the image token.

        Whoever reads it by transformers gets the images and prompts of training.
        """
        from mmtrain.models import building
        from mmtrain.models.families.llava import images, prompts
        from mmtrain.models.families.llava.vocabulary import with_image_token

        config, state = with_image_token(model.config, state)
        written = copy.copy(processor)
        written.image_processor = images.padding_processor(processor.image_processor)
        written.chat_template = prompts.chat_template(processor.image_gap)
        building.save_folder(config, written, state, folder)


@dataclass(frozen=True)
class Opened:
    """A checkpoint folder before its weights are read."""

    processor: Any
    sources: Sequence[WeightFolder]  # folders of weights, with their key layouts
    is_standard: bool  # transformers reads it, too


def open_folder(options: ModelOptions, config: Any, model_types: tuple[str, ...]) -> Opened:
    """Its processor and where its weights lie."""
    from mmtrain.models import building, configuration
    from mmtrain.models.families.llava import original, prompts

    folder = Path(str(options.checkpoint))
    stored = configuration.stored_config(folder, model_types)
    sources: Sequence[WeightFolder] = [(folder, rename)]
    is_original = original.is_original(stored)
    if is_original:
        sources = original.sources(stored, options)
        processor = original.original_processor(stored, options, config, IMAGE_TOKEN)
    else:
        processor = building.load_processor(folder, IMAGE_TOKEN, config.image_token_id)
    size = processor.image_processor.crop_size
    found = size["height"], size["width"]
    building.refuse_other_image_size(folder, found, config.vision_config.image_size)
    processor.tokens_per_image = tokens_per_image(config)
    processor.num_cue_tokens = prompts.num_cue_tokens(processor.tokenizer)
    processor.image_gap = prompts.gap_behind_images(processor.tokenizer)
    return Opened(processor, sources, not is_original)


def refuse_tiled_images(folder: Path, stored: Mapping[str, Any]) -> None:
    """LLaVA-1.6 cuts images into tiles; its other settings are those of LLaVA-1.5."""
    if stored.get("image_aspect_ratio") == "anyres":
        raise CheckpointError(
            f"{folder}/config.json: image_aspect_ratio is 'anyres', as in LLaVA-1.6.",
            "Use a checkpoint of the LLaVA-1.5 or ShareGPT4V generation.",
        )


FAMILY = Llava()
