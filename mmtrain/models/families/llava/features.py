"""From tokens and pixels to the sequence the LLM reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tokens_per_image(config: Any) -> int:
    """Features one image contributes to the sequence: patches, and the class token if kept."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy != "default")


def embed(model: Any, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Token embeddings with projected image features in the places of image tokens."""
    inner = model.model
    is_image = input_ids == model.config.image_token_id
    # The image token may lie outside an unpadded vocabulary: it is never looked up.
    embeds = inner.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
    features = inner.multi_modal_projector(vision_features(model, pixel_values))
    features = features.reshape(-1, features.shape[-1]).to(embeds.dtype)
    return embeds.masked_scatter(is_image.unsqueeze(-1), features)


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
