"""Checkpoints in the format of LLaVA's own code, ShareGPT4V's among them.

config.json is a flat LLaMA configuration with `mm_…` keys; the vision tower lies inside the
checkpoint, or in a CLIP folder of its own that `mm_vision_tower` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError
from mmtrain.models import configuration, weights
from mmtrain.models.families.llava.layouts import is_tower_of_original, rename_clip, rename_original
from mmtrain.models.families.llava.shapes import CLIP_L_336
from mmtrain.models.interface import ModelOptions
from mmtrain.models.sentencepiece_file import cut_as_sentencepiece, read_where_alone

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_LLAMA_KEYS = (
    "attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size"
    " initializer_range intermediate_size max_position_embeddings mlp_bias num_attention_heads"
    " num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps rope_parameters rope_scaling"
    " rope_theta tie_word_embeddings vocab_size"
).split()
_CLIP_KEYS = (*CLIP_L_336, "attention_dropout", "hidden_act", "layer_norm_eps")
_PROJECTOR = "mlp2x_gelu"
_FEATURES = {"patch": "default", "cls_patch": "full"}


def is_original(stored: Mapping[str, object]) -> bool:
    """Whether config.json is of LLaVA's own code, not of transformers."""
    return "text_config" not in stored and (
        "mm_vision_tower" in stored or stored.get("model_type") != "llava"
    )


def original_config(stored: Mapping[str, Any], options: ModelOptions) -> PretrainedConfig:
    """The configuration of transformers' class for such a checkpoint."""
    from transformers import LlavaConfig

    folder = Path(str(options.checkpoint))
    _refuse_other_shapes(folder, stored)
    tower = tower_folder(folder, stored, options)
    if tower is None and weights.has_weights(folder):
        sources(stored, options)  # refuses a folder that has no tower inside either
    text = {key: stored[key] for key in _LLAMA_KEYS if key in stored}
    feature = stored.get("mm_vision_select_feature", "patch")
    translated = dict(
        architectures=["LlavaForConditionalGeneration"],
        text_config={"model_type": "llama", **text},
        vision_config=CLIP_L_336 if tower is None else _tower_config(tower),
        # Outside the vocabulary, as -200 is in LLaVA's code: it is never looked up.
        image_token_index=stored.get("vocab_size", 32000),
        vision_feature_layer=stored.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_FEATURES[feature],
        projector_hidden_act="gelu",
        tie_word_embeddings=stored.get("tie_word_embeddings", False),
    )
    return configuration.parsed(LlavaConfig, translated, folder)


def _refuse_other_shapes(folder: Path, stored: Mapping[str, object]) -> None:
    expected: dict[str, tuple[object, tuple[object, ...]]] = {
        "mm_projector_type": (stored.get("mm_projector_type", "linear"), (_PROJECTOR,)),
        "mm_vision_select_feature": (
            stored.get("mm_vision_select_feature", "patch"),
            tuple(_FEATURES),
        ),
        "mm_use_im_start_end": (stored.get("mm_use_im_start_end", False), (False, None)),
    }
    for key, (found, allowed) in expected.items():
        if found not in allowed:
            raise CheckpointError(
                f"{folder}/config.json: {key} is {found!r}, this family reads {allowed[0]!r}.",
                "Use a checkpoint of the LLaVA-1.5 or ShareGPT4V generation.",
            )


def tower_folder(folder: Path, stored: Mapping[str, object], options: ModelOptions) -> Path | None:
    """Where the vision tower lies: `model.vision_tower`, or `mm_vision_tower` if it is a folder."""
    if options.vision_tower is not None:
        chosen = Path(options.vision_tower)
        if not chosen.is_dir():
            raise CheckpointError(
                f"model.vision_tower: {chosen} is no folder.",
                "Download the tower there, or correct the path.",
            )
        return chosen
    named = stored.get("mm_vision_tower")
    inside = folder / str(named)  # an absolute name stays what it is
    return inside if named and inside.is_dir() else None


def _tower_config(tower: Path) -> dict[str, object]:
    """The vision side of a CLIP folder's config.json."""
    stored = weights.read_json(tower / "config.json")
    vision = stored.get("vision_config", stored)
    if stored.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(
        vision, dict
    ):
        raise CheckpointError(
            f"{tower}: is a '{stored.get('model_type')}' folder, no CLIP vision tower.",
            "Give the tower that mm_vision_tower in the checkpoint's config.json names.",
        )
    known = {key: vision[key] for key in _CLIP_KEYS if key in vision}
    return {**known, "model_type": "clip_vision_model"}


def sources(stored: Mapping[str, object], options: ModelOptions) -> list[weights.WeightFolder]:
    """The folders that hold the weights. A tower inside the checkpoint was tuned: it wins."""
    folder = Path(str(options.checkpoint))
    own: list[weights.WeightFolder] = [(folder, rename_original)]
    if any(is_tower_of_original(name) for name in weights.weight_files(folder)):
        return own
    tower = tower_folder(folder, stored, options)
    if tower is None:
        raise CheckpointError(
            f"{folder}: its vision tower is elsewhere: mm_vision_tower is"
            f" '{stored.get('mm_vision_tower')}'.",
            "Download that folder and name it: model.vision_tower, or --vision-tower of convert.",
        )
    return [*own, (tower, rename_clip)]


def original_processor(
    stored: Mapping[str, object], options: ModelOptions, config: PretrainedConfig, image_token: str
) -> Any:
    """Tokenizer of the checkpoint, images as the tower's folder says, in transformers' class."""
    from transformers import LlavaProcessor

    folder = Path(str(options.checkpoint))
    tokenizer = _tokenizer(folder)
    size = config.text_config.vocab_size
    if image_token not in tokenizer.get_vocab():
        if len(tokenizer) != size:
            raise CheckpointError(
                f"{folder}: its tokenizer knows {len(tokenizer)} tokens, config.json says {size}.",
                "Use tokenizer and config.json of the same checkpoint.",
            )
        tokenizer.add_tokens([image_token], special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(image_token)
    if found != config.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {image_token} the id {found}, not the vocabulary's size"
            f" {config.image_token_id}.",
            "Use tokenizer and config.json of the same checkpoint.",
        )
    if tokenizer("").input_ids != [tokenizer.bos_token_id]:
        raise CheckpointError(
            f"{folder}: its tokenizer does not begin a text with {tokenizer.bos_token}, or ends it"
            " with more.",
            "Copy tokenizer.model from the published checkpoint, and remove tokenizer.json.",
        )
    return LlavaProcessor(
        image_processor=_image_processor(tower_folder(folder, stored, options), config),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=image_token,
    )


def _tokenizer(folder: Path) -> Any:
    """From `tokenizer.json` as it is, where somebody made one; else from `tokenizer.model`.

    The begin-of-text token is asked for: files may leave it to the class.
    """
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    sentencepiece = read_where_alone(folder)
    try:
        if sentencepiece is None:
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        tokenizer = LlamaTokenizer.from_pretrained(
            str(folder),
            legacy=sentencepiece.legacy,
            add_bos_token=True,
            add_eos_token=False,
            local_files_only=True,
        )
    except (OSError, ValueError, ImportError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: no usable tokenizer there ({fault}).",
            "Copy tokenizer.model or tokenizer.json from the published checkpoint.",
        ) from error
    cut_as_sentencepiece(tokenizer, sentencepiece)
    # Saved with it, for those who read it by this class.
    tokenizer.init_kwargs["legacy"] = sentencepiece.legacy
    return tokenizer


def _image_processor(tower: Path | None, config: PretrainedConfig) -> object:
    """As the tower's folder says; without one, the published size and CLIP's mean and deviation."""
    from transformers import CLIPImageProcessorPil

    if tower is not None and (tower / "preprocessor_config.json").exists():
        return CLIPImageProcessorPil.from_pretrained(str(tower), local_files_only=True)
    size = config.vision_config.image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
