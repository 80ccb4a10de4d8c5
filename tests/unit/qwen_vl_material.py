"""A Qwen-VL folder with lively weights, and samples for it: material of the Qwen-VL tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from mmtrain import plugins
from mmtrain.models import decoding, encoding
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from mmtrain.tasks.interface import Rendered, Turn
from tests.tiny import DIGITS_TEXTS
from tests.unit.folder_faults import edit_json, stored_tensors, write_tensors

FAMILY = plugins.load("family", "qwen_vl")
GOLDEN = Path(__file__).parents[1] / "golden" / "qwen_vl"
# Where the published files lie on machines that have them.
REAL_DATA = Path(os.environ.get("MMTRAIN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
PUBLISHED = REAL_DATA / "qwen-vl-chat"
GREEDY = SimpleNamespace(
    max_new_tokens=6,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=8,
)
TOLERANCE = 1e-5
ROLES = ("user", "assistant")


def write_plain(folder: Path) -> Path:
    """The tiny checkpoint as a user's folder would be."""
    FAMILY.code.write_tiny(folder, DIGITS_TEXTS, 0)
    return folder


def write_lively(folder: Path, **config: Any) -> Path:
    """Weights that matter everywhere: large, with biases and norms that are not 0 and 1."""
    write_plain(folder)
    generator = torch.Generator().manual_seed(3)
    tensors = stored_tensors(folder)
    for name in sorted(tensors):
        tensors[name] += torch.randn(tensors[name].shape, generator=generator) * 0.1
    write_tensors(folder, tensors)
    edit_json(folder / "config.json", **config)
    return folder


def load(folder: Path, **options: Any) -> LoadedModel:
    """The folder through the family, in fp32."""
    given = {"checkpoint": str(folder), "preset": None, "dtype": "fp32", **options}
    return FAMILY.code.load(ModelOptions(**given), None)


def image(number: int) -> Image.Image:
    """An image with detail that no other number has."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (40, 48 + number, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def example(
    processor: Any,
    name: str,
    question: str,
    target: str,
    images: Sequence[Image.Image] = (),
    earlier: Sequence[tuple[str, str]] = (),
    max_length: int = 512,
    side: str = "left",
) -> Example:
    """One encoded conversation: earlier (question, answer) pairs, then question and target."""
    turns = [Turn(role, text) for pair in earlier for role, text in zip(ROLES, pair, strict=True)]
    rendered = Rendered((*turns, Turn("user", question)), target)
    return encoding.encode(FAMILY, processor, name, rendered, images, max_length, side)


def mixed(processor: Any) -> list[Example]:
    """With and without images, long and short, one and several turns."""
    return [
        example(processor, "with", "Which digit is in the picture?", "5", [image(1)]),
        example(processor, "text", "Say 7.", "7 and then 8"),
        example(processor, "two", "Same?", "no", [image(2), image(3)]),
        example(
            processor,
            "turns",
            "And now?",
            "2",
            [image(4)],
            [("Which digit?", "3"), ("Why?", "4")],
        ),
    ]


def padded(examples: Sequence[Example], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of whole samples, padded on either side."""
    from mmtrain.models.batching import pad_ids

    return pad_ids([one.input_ids for one in examples], side)


def embeds_of(model: Any, batch: Any, ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """What the decoder reads of these ids and the batch's images."""
    features = FAMILY.code.image_features(model, batch)
    tensors = {"input_ids": ids, "is_image": ids == image_token_id}
    return decoding.embed(FAMILY, model, tensors, features)[0]


def logits_of(loaded: LoadedModel, examples: Sequence[Example], side: str) -> list[torch.Tensor]:
    """Our logits of every sample at its own tokens, from one batch."""
    ids, mask = padded(examples, side)
    batch = FAMILY.code.collate(examples, loaded.processor)
    model = loaded.model
    with torch.no_grad():
        embeds = embeds_of(model, batch, ids, loaded.processor.image_token_id)
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    return [row[kept.bool()] for row, kept in zip(logits, mask, strict=True)]
