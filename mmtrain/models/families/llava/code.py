"""What LLaVA computes: configuration, folders, samples, features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from mmtrain.errors import CheckpointError
from mmtrain.models import batching, building, configuration, text, tiny
from mmtrain.models.decoding import training_mask
from mmtrain.models.dropout import stable_hash
from mmtrain.models.families.llava import images as llava_images
from mmtrain.models.families.llava import original, prompts
from mmtrain.models.families.llava.layouts import rename
from mmtrain.models.families.llava.processing import Processor, make_processor
from mmtrain.models.families.llava.prompts import IMAGE_TOKEN, SYSTEM
from mmtrain.models.families.llava.shapes import MODEL_TYPES, PRESETS, tokens_per_image
from mmtrain.models.families.llava.vocabulary import with_image_token
from mmtrain.models.interface import (
    AttentionShape,
    Batch,
    BatchSize,
    Example,
    ImageFeatures,
    LoadedModel,
    ModelOptions,
    ProcessorCode,
    SharedPrompts,
    Size,
)
from mmtrain.models.weights import WeightFolder

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtrain.tasks.interface import Rendered

Tensors = Mapping[str, torch.Tensor]


def model_config(options: ModelOptions) -> Any:
    """The configuration of a checkpoint folder or of a preset."""
    config: Any
    if options.checkpoint is None:
        config = LlavaConfig(**dict(PRESETS[str(options.preset)]))
    else:
        folder = Path(options.checkpoint)
        stored = configuration.stored_config(folder, MODEL_TYPES)
        _refuse_tiled_images(folder, stored)
        if original.is_original(stored):
            config = original.original_config(stored, options)
        else:
            config = configuration.parsed(LlavaConfig, stored, folder)
    parts = {"llm": config.text_config, "vision": config.vision_config}
    configuration.set_working_precision(config, parts, options)
    configuration.apply_overrides(parts, options)
    configuration.settle_attention_dropout(parts.values(), options)
    return config


def _refuse_tiled_images(folder: Path, stored: Mapping[str, Any]) -> None:
    """LLaVA-1.6 cuts images into tiles; its other settings are those of LLaVA-1.5."""
    if stored.get("image_aspect_ratio") == "anyres":
        raise CheckpointError(
            f"{folder}/config.json: image_aspect_ratio is 'anyres', as in LLaVA-1.6.",
            "Use a checkpoint of the LLaVA-1.5 or ShareGPT4V generation.",
        )


def skeleton(config: Any) -> nn.Module:
    """The module tree on the current default device, weights unset."""
    with no_init_weights():
        return LlavaForConditionalGeneration(config)


def load(options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
    """Build and fill the base; a preset gets keyed random weights."""
    config = model_config(options)
    processor, is_standard = None, True
    sources: Sequence[WeightFolder] = []
    if options.checkpoint is not None:
        processor, sources, is_standard = _open_folder(options, config)
    model = building.build_empty(skeleton, config, options, zero3_config)
    files = building.fill(model, sources, options)
    return LoadedModel(model, processor, config, files, is_standard)


def read_processor(options: ModelOptions, config: Any) -> Processor:
    """Of a checkpoint folder, in either format."""
    return _open_folder(options, config)[0]


def _open_folder(
    options: ModelOptions, config: Any
) -> tuple[Processor, Sequence[WeightFolder], bool]:
    """A checkpoint's processor, its folders of weights, and whether transformers reads it, too."""
    folder = Path(str(options.checkpoint))
    stored = configuration.stored_config(folder, MODEL_TYPES)
    sources: Sequence[WeightFolder] = [(folder, rename)]
    is_original = original.is_original(stored)
    if is_original:
        sources = original.sources(stored, options)
        found = original.original_processor(stored, options, config, IMAGE_TOKEN)
    else:
        found = building.load_processor(folder, IMAGE_TOKEN, config.image_token_id)
    size = found.image_processor.crop_size
    building.refuse_other_image_size(
        folder, (size["height"], size["width"]), config.vision_config.image_size
    )
    return make_processor(found, config), sources, not is_original


def attention(config: Any, component: str) -> AttentionShape:
    """The attention shape of `llm` or `vision`."""
    part = config.text_config if component == "llm" else config.vision_config
    heads = part.num_attention_heads
    kv_heads = getattr(part, "num_key_value_heads", None) or heads
    layers, hidden = part.num_hidden_layers, part.hidden_size
    return AttentionShape(layers, heads, kv_heads, hidden // heads, hidden)


def image_tokens(config: Any, component: str) -> int:
    """The class token is one more in the tower."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + 1 if component == "vision" else tokens_per_image(config)


def encode_text(
    processor: Processor,
    sample_id: str,
    rendered: Rendered,
    sizes: Sequence[Size],
    max_length: int,
    truncation_side: str,
) -> Example:
    """Tokenise in the vicuna_v1 form, images before their questions."""
    turns = text.conversation(rendered, len(sizes))
    control_tokens = processor.tokenizer.all_special_tokens
    text.refuse_control_tokens(control_tokens, sample_id, (said for _, said, _ in turns))
    pieces = prompts.pieces(turns, processor.image_gap)
    ids, labels = text.tokenise(processor.tokenizer, pieces)
    token_id = processor.image_token_id
    ids, labels = text.expand(ids, labels, token_id, processor.tokens_per_image)
    ids, labels = text.truncate(
        ids, labels, token_id, max_length, truncation_side, sample_id, processor.num_cue_tokens
    )
    return Example(sample_id, stable_hash(sample_id), ids, labels)


def pixels(processor: Processor, images: Sequence[Image]) -> list[torch.Tensor]:
    """Padded to squares, as in training of the published models."""
    return llava_images.pixel_values(processor.image_processor, images)


def collate(examples: Sequence[Example], processor: Processor, generating: bool = False) -> Batch:
    """A batch without any image carries a blank one that nothing reads."""
    side = processor.image_size
    tensors = batching.text_tensors(examples, processor.image_token_id, generating)
    tensors |= batching.image_tensors(examples, side, side)
    if not generating:
        tensors |= batching.answer_targets(examples, tensors["input_ids"].shape[1])
    return batching.make_batch(examples, tensors)


def planned_batch(config: Any, size: BatchSize) -> Batch:
    """A batch of this size, to measure what it costs."""
    side, image_id = config.vision_config.image_size, config.image_token_id
    image = [image_id] * image_tokens(config, "llm")
    examples = batching.planned_examples(size, image, torch.zeros(3, side, side), {})
    return collate(examples, Processor(None, image_id, len(image), 0, "", side))


def image_features(model: Any, batch: Batch) -> ImageFeatures:
    """Of every image [images, tokens, channels]."""
    seen = vision_features(model, batch.tensors["pixel_values"])
    return ImageFeatures(model.model.multi_modal_projector(seen))


def vision_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The tower's output at the feature layer; blocks above it would compute nothing used."""
    tower, config = model.model.vision_tower, model.config
    layers = tower.encoder.layers
    depth = config.vision_feature_layer
    if depth < 0:
        depth = len(layers) + 1 + depth
    hidden = tower.embeddings(pixel_values.to(tower.embeddings.patch_embedding.weight.dtype))
    hidden = tower.pre_layrnorm(hidden)
    for layer in layers[:depth]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden


def decoder(model: Any) -> Any:
    """The whole model: it takes embeddings, too."""
    return model


def hidden_states(
    model: Any,
    embeds: torch.Tensor,
    tensors: Tensors,
    features: ImageFeatures,
    shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """The LLM's last hidden states."""
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=training_mask(tensors),
        position_ids=tensors.get("position_ids"),
        past_key_values=shared and shared.past,
        use_cache=shared is not None,
    ).last_hidden_state


def generation_inputs(model: Any, tensors: Tensors, features: ImageFeatures) -> dict[str, Any]:
    """Nothing more."""
    return {}


def processor_code(options: ModelOptions) -> ProcessorCode | None:
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


def write_tiny(folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny") -> None:
    """A tiny checkpoint: real classes, a tokenizer trained on `texts`, a real processor."""
    config = model_config(ModelOptions(None, preset=preset, dtype="fp32"))
    tokenizer = tiny.train_tokenizer([SYSTEM, " USER: ASSISTANT:", *texts], IMAGE_TOKEN)
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.image_token_id = config.image_token_index
    tiny.write_llava_folder(skeleton, config, tokenizer, folder, seed)


def save(model: Any, processor: Processor, state: Tensors, folder: Path) -> None:
    """A standard Hugging Face folder, its vocabulary padded if it lacks the image token.

    Whoever reads it by transformers gets the images and prompts of training.
    """
    config, state = with_image_token(model.config, state)
    written = copy.copy(processor.hf)
    written.image_processor = llava_images.padding_processor(processor.image_processor)
    written.chat_template = prompts.chat_template(processor.image_gap)
    building.save_folder(config, written, state, folder)
