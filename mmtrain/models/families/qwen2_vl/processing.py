"""Tokenizer and image side of a checkpoint folder, checked against its configuration.

transformers' own processor class needs torchvision for its video part; images do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models.building import refuse_larger_tokenizer

IMAGE_TOKEN = "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# What the published chat templates put before the first turn.
SYSTEM = {
    "qwen2_vl": "You are a helpful assistant.",
    "qwen2_5_vl": "You are a helpful assistant.",
    "qwen3_vl": None,
}
ANSWER_CUE = f"{TURN_END}\n{TURN_START}assistant\n"


@dataclass(frozen=True)
class Processor:
    """What encoding needs of a checkpoint folder."""

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    kept_ids: frozenset[int]  # tokens of the form, which truncation never cuts
    num_cue_tokens: int
    stop_ids: tuple[int, ...]  # generation ends at any of these
    control_tokens: tuple[str, ...]  # spellings that no sample's text may hold
    system: str | None

    @property
    def merge_size(self) -> int:
        """Side of the square of patches that make one token."""
        return int(self.image_processor.merge_size)

    def save_pretrained(self, folder: str) -> None:
        """The files of tokenizer and image processor, chat template included."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def make_processor(tokenizer: Any, image_processor: Any, model_type: str) -> Processor:
    """A processor of the two parts."""
    to_id = tokenizer.convert_tokens_to_ids
    form = (IMAGE_TOKEN, VISION_START, VISION_END, TURN_START, TURN_END)
    cue = tokenizer(ANSWER_CUE, add_special_tokens=False)["input_ids"]
    control = sorted(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    )
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_token_id=to_id(IMAGE_TOKEN),
        kept_ids=frozenset(to_id(token) for token in form),
        num_cue_tokens=len(cue),
        # The end of a turn or of a text; which one is called eos, base and chat models disagree.
        stop_ids=tuple(
            sorted({to_id(TURN_END), tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})
        ),
        control_tokens=tuple(control),
        system=SYSTEM[model_type],
    )


def load_processor(folder: Path, config: Any, max_pixels: int | None) -> Processor:
    """The folder's processor; one that does not fit config.json is an error."""
    from transformers import AutoTokenizer

    # The one image processor that needs no torchvision: pixels do not depend on the installation.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            str(folder), local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: no usable tokenizer and image processor there ({fault}).",
            "Copy tokenizer and preprocessor files from the published checkpoint.",
        ) from error
    _check_tokens(folder, tokenizer, config)
    _check_images(folder, image_processor, config)
    if max_pixels is not None:
        _set_budget(image_processor, max_pixels)
    return make_processor(tokenizer, image_processor, config.model_type)


def _check_tokens(folder: Path, tokenizer: Any, config: Any) -> None:
    for token in (TURN_START, TURN_END):
        if token not in tokenizer.added_tokens_encoder:
            raise CheckpointError(
                f"{folder}: the tokenizer has no {token}, which every turn is written with.",
                "Copy the tokenizer files from the published checkpoint.",
            )
    wanted = {
        IMAGE_TOKEN: config.image_token_id,
        VISION_START: config.vision_start_token_id,
        VISION_END: config.vision_end_token_id,
    }
    for token, token_id in wanted.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != token_id:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {token} the id {found}, config.json says"
                f" {token_id}.",
                "Use tokenizer and config.json of the same checkpoint.",
            )
    refuse_larger_tokenizer(folder, len(tokenizer), config.text_config.vocab_size)


def _check_images(folder: Path, image_processor: Any, config: Any) -> None:
    vision = config.vision_config
    pairs = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, wanted in pairs.items():
        found = getattr(image_processor, name)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: its image processor has {name} {found}, config.json says {wanted}.",
                "Use preprocessor files and config.json of the same checkpoint.",
            )
    if not image_processor.do_resize:
        raise CheckpointError(
            f"{folder}: its image processor does not resize images (do_resize is false).",
            "Use the preprocessor files of the published checkpoint.",
        )
    least, most = image_processor.size.shortest_edge, image_processor.size.longest_edge
    if not least or not most or least > most:
        raise CheckpointError(
            f"{folder}: its image processor gives no range of pixels (from {least} to {most}).",
            "Use the preprocessor files of the published checkpoint.",
        )


def _set_budget(image_processor: Any, max_pixels: int) -> None:
    """Cap the pixels of an image; larger ones are scaled down, as the published code does."""
    least = image_processor.size.shortest_edge
    if max_pixels < least:
        raise ConfigError(
            [
                f"model.max_pixels: got {max_pixels}, the checkpoint scales every image up to"
                f" at least {least} pixels; give {least} or more"
            ]
        )
    image_processor.size.longest_edge = max_pixels
