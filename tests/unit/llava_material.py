"""A LLaVA folder with lively weights, and samples for it: material of the LLaVA tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from mmtrain import plugins
from mmtrain.models import decoding, encoding
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from mmtrain.models.text import IGNORED
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny

FAMILY = plugins.load("family", "llava")
GREEDY = SimpleNamespace(
    max_new_tokens=6,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=8,
)


def write_lively(folder: Path) -> Path:
    """Weights that matter everywhere: large, with biases and norms that are not 0 and 1."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    plain = tiny.write_checkpoint(folder / "plain")
    model = LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    target = folder / "lively"
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(plain).save_pretrained(target)
    return target


def load(folder: Path) -> LoadedModel:
    """The folder through the family, in fp32."""
    return FAMILY.code.load(ModelOptions(checkpoint=str(folder), preset=None, dtype="fp32"), None)


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


ROLES = ("user", "assistant")


def mixed(processor: Any) -> list[Example]:
    """With and without image, long and short, one and several turns."""
    return [
        example(processor, "with", "Which digit is in the picture?", "5", [image(1)]),
        example(processor, "text", "Say 7.", "7 and then 8"),
        example(
            processor,
            "turns",
            "And now?",
            "2",
            [image(2)],
            [("Which digit?", "3"), ("Why?", "4")],
        ),
    ]


def inputs_of(one: Example, processor: Any) -> dict[str, torch.Tensor]:
    """A sample as transformers' own model wants it."""
    inputs = {"input_ids": torch.tensor([one.input_ids])}
    return inputs | ({"pixel_values": torch.stack(list(one.pixels))} if one.pixels else {})


def spaced(processor: Any) -> Example:
    """Spaces around every text: LLaVA's code takes them away behind an image only."""
    earlier = [("\n Which digit? ", " 3 ")]
    return example(processor, "spaced", " And now? ", " 2", [image(1)], earlier)


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    """Our forward up to the logits, at every position."""
    return model.lm_head(decoding.hidden_states(FAMILY, model, batch)[0])


def decoded(processor: Any, ids: Sequence[int]) -> str:
    """The text of tokens, image tokens counted."""
    parts = []
    for is_image, group in groupby(ids, lambda one: one == processor.image_token_id):
        run = list(group)
        text = f"<image>*{len(run)}" if is_image else processor.tokenizer.decode(run)
        parts.append(text)
    return "".join(parts)


def readable(processor: Any, one: Example) -> str:
    """Stretches without loss behind a dot, stretches with loss behind an arrow."""
    lines = [f"=== {one.id}: {len(one.pixels)} picture(s)"]
    pairs = zip(one.input_ids, one.labels, strict=True)
    for has_loss, group in groupby(pairs, lambda pair: pair[1] != IGNORED):
        run = list(group)
        assert all(label in (IGNORED, token) for token, label in run)
        text = decoded(processor, [token for token, _ in run]).replace("\n", "\\n")
        lines.append(f"{'loss >' if has_loss else '     .'}{text}|")
    return "\n".join(lines) + "\n"
