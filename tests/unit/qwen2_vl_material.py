"""Folders of the three generations with lively weights, and samples: material of their tests."""

from __future__ import annotations

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
from tests.unit.folder_faults import Tensors

FAMILY = plugins.load("family", "qwen2_vl")
TINY = ("tiny", "tiny-2.5", "tiny-3")
GREEDY = SimpleNamespace(
    max_new_tokens=6,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=8,
)
ROLES = ("user", "assistant")


def write_plain(folder: Path, preset: str) -> Path:
    """The tiny checkpoint as a user's folder would be."""
    FAMILY.code.write_tiny(folder, DIGITS_TEXTS, 0, preset)
    return folder


def model_class(preset: str) -> Any:
    """transformers' own class."""
    from mmtrain.models.families.qwen2_vl.shapes import transformers_class

    model_type = FAMILY.presets[preset]["model_type"]
    return transformers_class(model_type, "ForConditionalGeneration")


def write_lively(folder: Path, preset: str) -> Path:
    """Weights that matter everywhere: large, with biases and norms that are not 0 and 1."""
    write_plain(folder, preset)
    model = reference(folder, preset)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    return folder


def reference(folder: Path, preset: str) -> Any:
    """transformers' own model of the folder."""
    return model_class(preset).from_pretrained(folder, dtype=torch.float32).eval()


def load(folder: Path, **options: Any) -> LoadedModel:
    """The folder through the family, in fp32."""
    given = {"checkpoint": str(folder), "preset": None, "dtype": "fp32", **options}
    return FAMILY.code.load(ModelOptions(**given), None)


def image(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image (width, height) with detail that no other number has."""
    generator = torch.Generator().manual_seed(number)
    shape = (size[1], size[0], 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
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
    """With and without images, of several sizes; long and short; one and several turns."""
    wide, small = image(2, (70, 24)), image(3, (17, 40))
    return [
        example(processor, "with", "Which digit is in the picture?", "5", [image(1)]),
        example(processor, "text", "Say 7.", "7 and then 8"),
        example(processor, "two", "Same?", "no", [wide, small]),
        example(
            processor,
            "turns",
            "And now?",
            "2",
            [image(4, (40, 48))],
            [("Which digit?", "3"), ("Why?", "4")],
        ),
    ]


def image_inputs(one: Example) -> Tensors:
    """What transformers' own model wants to know of a sample's images."""
    if not one.pixels:
        return {}
    grid = torch.tensor(one.extras["grid"])
    return {"pixel_values": torch.cat(list(one.pixels)), "image_grid_thw": grid}


def inputs_of(one: Example, processor: Any) -> Tensors:
    """A sample as transformers' own model wants it."""
    return {
        "input_ids": torch.tensor([one.input_ids]),
        "mm_token_type_ids": token_types(one.input_ids, processor),
        **image_inputs(one),
    }


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """Ours, at every position."""
    return model.lm_head(decoding.hidden_states(FAMILY, model, batch)[0])


def token_types(ids: Sequence[int], processor: Any) -> torch.Tensor:
    """1 for image tokens, as transformers' own processor gives them."""
    return torch.tensor([[int(one == processor.image_token_id) for one in ids]])
