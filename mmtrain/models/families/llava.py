"""LLaVA-1.5: CLIP ViT-L/14-336, a two-layer projector, Vicuna.

The conversation is vicuna_v1, as the published models were trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError
from mmtrain.models.interface import (
    AttentionShape,
    Batch,
    DefaultRoles,
    Example,
    ForwardResult,
    LoadedModel,
    ModelOptions,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from mmtrain.tasks.interface import Rendered

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = "<image>"
ANSWER_CUE = " ASSISTANT:"

_CLIP_L_336 = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


def _vicuna(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32000
) -> dict:
    return dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _preset(text: dict, vision: dict, image_token: int = 32000) -> dict[str, Any]:
    return dict(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )


_TINY_VISION = dict(
    model_type="clip_vision_model",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    projection_dim=64,
)
_LLM_LAYER = r"model\.language_model\.layers\.(?P<layer>\d+)"
_CLIP_LAYER = r"model\.vision_tower\.encoder\.layers\.(?P<layer>\d+)"
# Key layouts of Hugging Face LLaVA folders, oldest first; the current one needs no renaming.
_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_NOT_WEIGHTS = re.compile(r"\.(position_ids|inv_freq)$")


def rename(stored: str) -> str | None:
    """A stored tensor's name in today's module tree; None for what is no weight."""
    if _NOT_WEIGHTS.search(stored):
        return None
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored


class Llava:
    """The family plug-in."""

    presets: Mapping[str, Mapping[str, Any]] = {
        "llava-1.5-7b": _preset(_vicuna(4096, 11008, 32, 32), _CLIP_L_336),
        "llava-1.5-13b": _preset(_vicuna(5120, 13824, 40, 40), _CLIP_L_336),
        "tiny": _preset(_vicuna(96, 256, 4, 4, vocabulary=512), _TINY_VISION, image_token=4),
    }
    model_types = ("llava",)
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

        if options.checkpoint is None:
            config = LlavaConfig(**dict(self.presets[str(options.preset)]))
        else:
            folder = Path(options.checkpoint)
            stored = configuration.stored_config(folder, self.model_types)
            config = configuration.parsed(LlavaConfig, stored, folder)
        text, vision = config.text_config, config.vision_config
        parts = {"llm": text, "vision": vision}
        configuration.set_working_precision(config, parts, options)
        configuration.apply_overrides(parts, options)
        if options.base_dropout == 0:
            text.attention_dropout = 0.0
            vision.attention_dropout = 0.0
        elif text.attention_dropout or vision.attention_dropout:
            # It falls on attention weights inside fused kernels, which draw from a generator.
            raise CheckpointError(
                "model.base_dropout: this checkpoint's attention dropout cannot be keyed by"
                " sample, so a resume would not be exact.",
                "Set model.base_dropout: 0.",
            )
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
        model = building.build_empty(self.skeleton, config, options.dtype, zero3_config)
        processor = None
        if options.checkpoint is None:
            building.initialise_weights(dict(model.named_parameters()), options.seed)
        else:
            folder = Path(options.checkpoint)
            processor = building.load_processor(folder, IMAGE_TOKEN, config.image_token_id)
            refuse_other_picture_size(folder, processor, config)
            processor.tokens_per_image = tokens_per_image(config)
            cue = processor.tokenizer(ANSWER_CUE, add_special_tokens=False)
            processor.num_cue_tokens = len(cue["input_ids"])
            building.load_weights(model, [(folder, rename)], options)
        return LoadedModel(model, processor, config)

    def attention(self, config: Any, component: str) -> AttentionShape:
        """The attention shape of `llm` or `vision`."""
        part = config.text_config if component == "llm" else config.vision_config
        heads = part.num_attention_heads
        kv_heads = getattr(part, "num_key_value_heads", None) or heads
        layers, hidden = part.num_hidden_layers, part.hidden_size
        return AttentionShape(layers, heads, kv_heads, hidden // heads, hidden)

    def picture_tokens(self, config: Any, component: str) -> int:
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
        """Tokenise in the vicuna_v1 form, pictures before the first question."""
        from mmtrain.models import text
        from mmtrain.models.dropout import stable_hash

        pieces = [text.Piece(SYSTEM)]
        for number, turn in enumerate(rendered.turns):
            pictures = f"{IMAGE_TOKEN}\n" * len(images) if number == 0 else ""
            if turn.role == "user":
                pieces.append(text.Piece(f" USER: {pictures}{turn.text}{ANSWER_CUE}"))
            else:
                pieces.append(text.Piece(f" {turn.text}</s>", is_answer=True))
        pieces.append(text.Piece(f" {rendered.target}</s>", is_answer=True))
        ids, labels = text.tokenise(processor.tokenizer, pieces)
        token_id = processor.image_token_id
        text.refuse_picture_tokens_in_text(ids, token_id, len(images), IMAGE_TOKEN, sample_id)
        ids, labels = text.expand(ids, labels, token_id, processor.tokens_per_image)
        ids, labels = text.truncate(
            ids, labels, token_id, max_length, truncation_side, sample_id, processor.num_cue_tokens
        )
        pixels = [
            processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
            for image in images
        ]
        return Example(sample_id, stable_hash(sample_id), ids, labels, pixels)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Right-pad; a batch without any picture carries a blank one that nothing reads."""
        import torch

        from mmtrain.models import answers
        from mmtrain.models.building import pad_ids
        from mmtrain.models.dropout import stable_hash

        input_ids, attention_mask = pad_ids([example.input_ids for example in examples], "right")
        pixels = [picture for example in examples for picture in example.pixels]
        picture_keys = [
            stable_hash(example.key, number)
            for example in examples
            for number in range(len(example.pixels))
        ]
        if not pixels:
            size = processor.image_processor.crop_size
            pixels, picture_keys = [torch.zeros(3, size["height"], size["width"])], [0]
        targets = answers.answer_targets(examples, input_ids.shape[1])
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": torch.stack(list(pixels)),
            "row_keys": torch.tensor([example.key for example in examples]),
            "picture_keys": torch.tensor(picture_keys),
            **targets,
        }
        num_answer_tokens = int((targets["answer_targets"] != -100).sum())
        num_tokens = sum(len(example.input_ids) for example in examples if example.weight > 0)
        return Batch(tensors, [example.id for example in examples], num_answer_tokens, num_tokens)

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        """Tower, projector and LLM once each, whatever the batch holds."""
        from mmtrain.models.answers import answer_loss
        from mmtrain.models.dropout import scope_of

        tensors = batch.tensors
        scope = scope_of(model)
        scope.set_rows("vision", tensors["picture_keys"])
        scope.set_rows("connector", tensors["picture_keys"])
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
        from mmtrain.models.building import generate_from_embeddings, pad_ids
        from mmtrain.models.text import prompt_ids

        prompts = [prompt_ids(example.input_ids, example.labels) for example in examples]
        input_ids, attention_mask = pad_ids(prompts, "left")
        device = next(model.parameters()).device
        batch = self.collate(examples, processor).to(device)
        embeds = embed(model, input_ids.to(device), batch.tensors["pixel_values"])
        return generate_from_embeddings(
            model, processor.tokenizer, embeds, attention_mask.to(device), settings
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
        """A standard Hugging Face folder with these tensors."""
        from mmtrain.models import building

        building.save_folder(model, processor, state, folder)


def tokens_per_image(config: Any) -> int:
    """Features one picture contributes to the sequence: patches, and the class token if kept."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy != "default")


def refuse_other_picture_size(folder: Path, processor: Any, config: Any) -> None:
    """The processor must cut pictures to the size the tower was built for."""
    size, wanted = processor.image_processor.crop_size, config.vision_config.image_size
    if (size["height"], size["width"]) != (wanted, wanted):
        raise CheckpointError(
            f"{folder}: its processor makes pictures of {size['height']} x {size['width']},"
            f" config.json says {wanted} x {wanted}.",
            "Use preprocessor files and config.json of the same checkpoint.",
        )


def embed(model: Any, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Token embeddings with projected picture features in the places of picture tokens."""
    inner = model.model
    is_image = input_ids == model.config.image_token_id
    # The picture token may lie outside an unpadded vocabulary: it is never looked up.
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


FAMILY = Llava()
