"""From a conversation and its images to token ids, labels and patches."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image

from mmtrain.errors import DataError
from mmtrain.models import text
from mmtrain.models.dropout import stable_hash
from mmtrain.models.families.qwen2_vl.processing import (
    IMAGE_TOKEN,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    Processor,
)
from mmtrain.models.interface import Example

MAX_ASPECT_RATIO = 200  # of the published resizing
TEXT_REMEDY = "Raise data.max_length or leave the sample out."
IMAGE_REMEDY = "Lower model.max_pixels, raise data.max_length or leave the sample out."


def encode(
    processor: Processor,
    sample_id: str,
    turns: text.Turns,
    images: Sequence[Image],
    max_length: int,
    truncation_side: str,
) -> Example:
    """One conversation whose last turn is the answer; images stand before the first question."""
    text.refuse_control_tokens(processor.control_tokens, sample_id, (said for _, said in turns))
    ids, labels = text.tokenise(processor.tokenizer, pieces(processor, turns, len(images)))
    pixels, grids = [], []
    for image in images:
        _refuse_aspect_ratio(sample_id, image)
        cut = processor.image_processor(image, return_tensors="pt")
        pixels.append(cut["pixel_values"])
        grids.append(tuple(cut["image_grid_thw"][0].tolist()))
    ids, labels = _expand(ids, labels, processor, grids)
    ids, labels = text.truncate(
        ids,
        labels,
        processor.image_token_id,
        max_length,
        truncation_side,
        sample_id,
        processor.num_cue_tokens,
        also_kept=processor.kept_ids,
        remedy=IMAGE_REMEDY if images else TEXT_REMEDY,
    )
    return Example(sample_id, stable_hash(sample_id), ids, labels, pixels, extras={"grid": grids})


def pieces(processor: Processor, turns: text.Turns, num_images: int) -> list[text.Piece]:
    """The chat template of the published checkpoints, with the stretches that are answers.

    An answer ends with its end-of-turn token. The newline behind it is no part of the answer:
    generation stops before it, so it is never asked for.
    """
    found = []
    if processor.system is not None:
        found.append(text.Piece(f"{TURN_START}system\n{processor.system}{TURN_END}\n"))
    images = f"{VISION_START}{IMAGE_TOKEN}{VISION_END}" * num_images
    for role, said in turns:
        if role == "user":
            found.append(text.Piece(f"{TURN_START}user\n{images}{said}{TURN_END}\n"))
            images = ""
        else:
            found.append(text.Piece(f"{TURN_START}assistant\n"))
            found.append(text.Piece(f"{said}{TURN_END}", is_answer=True))
            found.append(text.Piece("\n"))
    return found


def num_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Tokens that an image of so many patches (time, height, width) makes."""
    frames, height, width = grid
    return frames * height * width // merge_size**2


def _expand(
    ids: Sequence[int], labels: Sequence[int], processor: Processor, grids: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Repeat each image token as often as its own image has tokens."""
    remaining = iter(grids)
    out_ids: list[int] = []
    out_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        is_image = token == processor.image_token_id
        count = num_tokens(next(remaining), processor.merge_size) if is_image else 1
        out_ids.extend([token] * count)
        out_labels.extend([label] * count)
    return out_ids, out_labels


def _refuse_aspect_ratio(sample_id: str, image: Image) -> None:
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise DataError(
            f"sample {sample_id}: an image of {image.width} x {image.height} pixels is more than"
            f" {MAX_ASPECT_RATIO} times as long as wide.",
            "Crop the image or leave the sample out.",
        )
