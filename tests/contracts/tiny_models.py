"""Tiny models of every family, found by listing them, for contract tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from mmtrain import plugins
from mmtrain.models import decoding, encoding
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny

TINY_MODELS = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
    if preset.startswith("tiny")
]
SETTINGS = SimpleNamespace(
    max_new_tokens=4,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=8,
)


class TinyModel:
    """A tiny checkpoint of a family, loaded."""

    def __init__(self, root: Path, name: str, preset: str) -> None:
        self.name, self.preset = name, preset
        self.family = plugins.load("family", name)
        self.folder = root / f"{name}-{preset}"
        self.family.code.write_tiny(self.folder, tiny.DIGITS_TEXTS, seed=0, preset=preset)

    @cache
    def loaded(self) -> LoadedModel:
        """The model, shared by tests that leave it as it is."""
        return self.load()

    def load(self, folder: Path | None = None, **options: Any) -> LoadedModel:
        """A model of its own."""
        chosen = ModelOptions(str(folder or self.folder), None, dtype="fp32", **options)
        return self.family.code.load(chosen, None)

    def encode(
        self,
        name: str,
        question: str,
        target: str,
        images: Sequence[Image.Image] = (),
        max_length: int = 2000,
        side: str = "left",
    ) -> Example:
        """One question, one answer."""
        rendered = Rendered((Turn("user", question),), target)
        processor = self.loaded().processor
        return encoding.encode(self.family, processor, name, rendered, images, max_length, side)

    def samples(self) -> list[Example]:
        """With and without image, of different lengths."""
        return [
            self.encode("short", "Which?", "5", [image(1)]),
            self.encode("text", "Which of these: 0, 1, 2, 3?", "7 and 8"),
            self.encode("long", "Which digit is in the picture? " * 3, "2", [image(2)]),
        ]

    def losses(self, model: Any, examples: Sequence[Example]) -> torch.Tensor:
        """Per sample."""
        batch = self.family.code.collate(examples, self.loaded().processor)
        with torch.no_grad():
            return decoding.forward(self.family, model, batch).per_sample_loss

    def answers(
        self, model: Any, examples: Sequence[Example], settings: Any = SETTINGS, **more: Any
    ) -> list[str]:
        """From one batch."""
        processor = self.loaded().processor
        return decoding.generate(self.family, model, processor, examples, settings, **more)


def image(number: int) -> Image.Image:
    """An image like no other."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
