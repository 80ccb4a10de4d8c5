"""What the Qwen2-VL generations compute: folders, image features, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mmtrain.models import building
from mmtrain.models.decoding import training_mask
from mmtrain.models.families.qwen2_vl import names, processing, shapes, tiny_model
from mmtrain.models.families.qwen2_vl.batches import collate, planned_batch
from mmtrain.models.families.qwen2_vl.encoding import encode_text, pixels
from mmtrain.models.families.qwen2_vl.shapes import attention_shape as attention
from mmtrain.models.families.qwen2_vl.shapes import image_tokens
from mmtrain.models.families.qwen2_vl.shapes import read_config as model_config
from mmtrain.models.families.qwen2_vl.tower_plan import plan
from mmtrain.models.interface import (
    Batch,
    ImageFeatures,
    LoadedModel,
    ModelOptions,
    ProcessorCode,
    SharedPrompts,
)

if TYPE_CHECKING:
    from mmtrain.models.families.qwen2_vl.processing import Processor

__all__ = [
    "attention",
    "collate",
    "encode_text",
    "image_tokens",
    "model_config",
    "pixels",
    "planned_batch",
]
Tensors = Mapping[str, torch.Tensor]


def skeleton(config: Any) -> nn.Module:
    """The module tree on the current default device, weights unset."""
    model_class = shapes.transformers_class(config.model_type, "ForConditionalGeneration")
    with no_init_weights():
        model = model_class(config)
        # As the smaller published models ask for; without initialisation nothing has done it.
        model.tie_weights()
    llm = model.model.language_model
    if hasattr(llm, "_deepstack_process"):
        setattr(llm, "_deepstack_process", add_deep_features)
    return model


def load(options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
    """Build and fill the base; a preset gets keyed random weights."""
    config = model_config(options)
    processor, sources = None, []
    if options.checkpoint is not None:
        processor = read_processor(options, config)
        sources = [(Path(options.checkpoint), names.rename)]
    model = building.build_empty(skeleton, config, options, zero3_config)
    files = building.fill(model, sources, options)
    return LoadedModel(model, processor, config, files)


def read_processor(options: ModelOptions, config: Any) -> processing.Processor:
    """Of a checkpoint folder."""
    folder = Path(str(options.checkpoint))
    return processing.load_processor(folder, config, options.max_pixels)


def image_features(model: Any, batch: Batch) -> ImageFeatures:
    """Merged patches [features, channels], and those of earlier blocks for Qwen3's LLM."""
    tower, tensors, grid = model.model.visual, batch.tensors, batch.host["grid"]
    pixel_values = tensors["pixel_values"]
    seen = tower(pixel_values, grid_thw=grid, **plan(tower, grid, pixel_values.device))
    # A blank image's features are computed and dropped, so that gradients run everywhere.
    read = tensors["feature_index"]
    deep = (one.index_select(0, read) for one in seen.get("deepstack_features") or ())
    return ImageFeatures(seen.pooler_output.index_select(0, read), tuple(deep))


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
    """The LLM's last hidden states; Qwen3's adds deep features in its first layers."""
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=training_mask(tensors),
        position_ids=tensors["position_ids"],
        past_key_values=shared and shared.past,
        use_cache=shared is not None,
        **_deep_arguments(features, tensors["is_image"], num_beams=1),
    ).last_hidden_state


def _deep_arguments(
    features: ImageFeatures, is_image: torch.Tensor, num_beams: int
) -> dict[str, Any]:
    """Deep features and the places they are added at; a row of a prompt may be several beams."""
    if not features.deep:
        return {}
    counts = is_image.sum(-1).tolist() if num_beams > 1 else []
    deep = [
        torch.cat([row.repeat(num_beams, 1) for row in one.split(counts)]) if counts else one
        for one in features.deep
    ]
    places = is_image.repeat_interleave(num_beams, dim=0)
    return {"visual_pos_masks": places, "deepstack_visual_embeds": deep}


def add_deep_features(
    hidden: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Qwen3's sum at the places of images; indexing by a mask would wait for the GPU to count."""
    source = features.to(hidden.dtype)
    return hidden + torch.zeros_like(hidden).masked_scatter(is_image.unsqueeze(-1), source)


def generation_inputs(model: Any, tensors: Tensors, features: ImageFeatures) -> dict[str, Any]:
    """Positions; each new token follows the last one of its row."""
    mask, is_image = tensors["attention_mask"], tensors["is_image"]
    in_text = (mask.cumsum(-1) - 1).clamp(min=0)

    def with_deep_features(_: Any, positional: Any, given: dict[str, Any]) -> tuple[Any, Any]:
        """At the first call only: generation has no argument for them."""
        handle.remove()
        beams = len(given["inputs_embeds"]) // len(is_image)
        return positional, given | _deep_arguments(features, is_image, beams)

    llm = model.model.language_model
    handle = llm.register_forward_pre_hook(with_deep_features, with_kwargs=True)
    return {"position_ids": torch.cat([in_text[None], tensors["position_ids"]])}


def processor_code(options: ModelOptions) -> ProcessorCode | None:
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


def write_tiny(folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny") -> None:
    """A tiny checkpoint: real classes, a tokenizer trained on `texts`, a real processor."""
    config = model_config(ModelOptions(None, preset=preset, dtype="fp32"))
    tiny_model.write(skeleton, config, texts, seed, folder)


def save(model: Any, processor: Processor, state: Tensors, folder: Path) -> None:
    """A standard Hugging Face folder with these tensors."""
    building.save_folder(model.config, processor, state, folder)
