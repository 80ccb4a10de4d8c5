"""What the Qwen2-VL generations compute: folders, image features, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mmtrain.models import building
from mmtrain.models.decoding import training_mask
from mmtrain.models.dropout import DropoutScope
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
        folder = Path(options.checkpoint)
        processor = processing.load_processor(folder, config, options.max_pixels)
        sources = [(folder, names.rename)]
    model = building.build_empty(skeleton, config, options.dtype, zero3_config)
    files = building.fill(model, sources, options)
    return LoadedModel(model, processor, config, files)


def key_dropout(scope: DropoutScope, tensors: Tensors) -> None:
    """The tower's rows are patches, one image behind the other."""
    scope.set_packed_rows("vision", tensors["patch_keys"], tensors["patch_index"])
    scope.set_rows("llm", tensors["row_keys"])


def image_features(model: Any, batch: Batch) -> ImageFeatures:
    """Merged patches [features, channels], and those of earlier blocks for Qwen3's LLM."""
    tower, tensors, grid = model.model.visual, batch.tensors, batch.host["grid"]
    pixel_values = tensors["pixel_values"]
    seen = tower(pixel_values, grid_thw=grid, **plan(tower, grid, pixel_values.device))
    # A blank image's features are computed and dropped, so that gradients run everywhere.
    read = tensors["feature_index"]
    deep = (one.index_select(0, read) for one in seen.get("deepstack_features") or ())
    lengths = grid.prod(-1) // tower.spatial_merge_size**2 if len(read) else grid[:0]
    features = seen.pooler_output.index_select(0, read)
    return ImageFeatures(features, tuple(deep), tuple(lengths.tolist()))


def embedding(model: Any) -> nn.Module:
    """The table of token embeddings."""
    return model.model.language_model.embed_tokens


def head(model: Any) -> nn.Module:
    """From hidden states to logits."""
    return model.lm_head


def hidden_states(
    model: Any, embeds: torch.Tensor, tensors: Tensors, features: ImageFeatures
) -> torch.Tensor:
    """The LLM's last hidden states; Qwen3's adds deep features in its first layers."""
    more = {}
    if features.deep:
        more = {
            "visual_pos_masks": tensors["is_image"],
            "deepstack_visual_embeds": list(features.deep),
        }
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=training_mask(tensors),
        position_ids=tensors["position_ids"],
        use_cache=False,
        **more,
    ).last_hidden_state


def add_deep_features(
    hidden: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Qwen3's sum at the places of images; indexing by a mask would wait for the GPU to count."""
    source = features.to(hidden.dtype)
    return hidden + torch.zeros_like(hidden).masked_scatter(is_image.unsqueeze(-1), source)


def generation_inputs(
    model: Any, embeds: torch.Tensor, tensors: Tensors, features: ImageFeatures
) -> tuple[Any, dict[str, Any]]:
    """Prompts with their features beside them: only so does Qwen3's LLM get deep ones.

    Positions are given, so the model neither computes them nor keeps any from call to call; each
    new token follows the last position of its row.
    """
    mask = tensors["attention_mask"]
    in_text = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {
        "attention_mask": mask,
        "position_ids": torch.cat([in_text[None], tensors["position_ids"]]),
    }
    if not features.deep:
        return model, {"inputs_embeds": embeds, **given}
    tokens, *deep = (one.split(features.lengths) for one in (features.tokens, *features.deep))
    seen = SimpleNamespace(pooler_output=tokens, deepstack_features=deep)
    return model, {
        "input_ids": tensors["input_ids"],
        "mm_encoder_outputs": {"image": seen} if features.lengths else {},
        **given,
    }


def stop_tokens(processor: Processor) -> dict[str, Any]:
    """The end of a turn or of a text; only masked positions hold the padding."""
    return {"eos_token_id": list(processor.stop_ids), "pad_token_id": processor.stop_ids[0]}


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
