"""Tokenizer and images of a checkpoint folder, checked against its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, Resampling

from mmtrain.errors import CheckpointError
from mmtrain.models.building import refuse_larger_tokenizer
from mmtrain.models.families.qwen_vl.configuration import QWenConfig, num_queries
from mmtrain.models.families.qwen_vl.tokenizer import (
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    TURN_END,
    TURN_START,
    QwenTokenizer,
    load_tokenizer,
)
from mmtrain.models.pixels import looked_up, rgb

# What CLIP's images were normalised by.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SPREAD = (0.26862954, 0.26130258, 0.27577711)
FORM_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_PAD, TURN_START, TURN_END)


@dataclass(frozen=True)
class Processor:
    """What encoding needs of a checkpoint folder."""

    tokenizer: QwenTokenizer
    image_size: int
    tokens_per_image: int

    @property
    def image_token_id(self) -> int:
        """Of the token that holds a place for a feature, between the two that embrace an image."""
        return self.tokenizer.special[IMAGE_PAD]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end of a turn or of a text."""
        return tuple(self.tokenizer.eos_token_id)

    @property
    def kept_ids(self) -> frozenset[int]:
        """Tokens of the form, which truncation never cuts."""
        return frozenset(self.tokenizer.special[token] for token in FORM_TOKENS)

    def save_pretrained(self, folder: str) -> None:
        """The tokenizer's files; images are described in config.json."""
        self.tokenizer.save_pretrained(folder)


def make_processor(tokenizer: QwenTokenizer, config: QWenConfig) -> Processor:
    """A processor for this configuration."""
    assert config.visual is not None
    return Processor(tokenizer, config.visual["image_size"], num_queries(config))


def load_processor(folder: Path, config: QWenConfig, grounding: bool) -> Processor:
    """The folder's processor; a tokenizer that does not fit config.json is an error."""
    tokenizer = load_tokenizer(folder, grounding)
    assert config.visual is not None
    found, wanted = tokenizer.special[IMAGE_START], config.visual["image_start_id"]
    if found != wanted:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {IMAGE_START} the id {found}, config.json says"
            f" {wanted}.",
            "Use tokenizer and config.json of the same checkpoint.",
        )
    refuse_larger_tokenizer(folder, len(tokenizer), config.vocab_size)
    return make_processor(tokenizer, config)


def pixel_values(image: Image, size: int) -> torch.Tensor:
    """[3, size, size]: the whole image, squeezed into a square, as the published code does."""
    square = rgb(image).resize((size, size), Resampling.BICUBIC)
    return looked_up(np.asarray(square), _values())


@cache
def _values() -> np.ndarray:
    """[3, 256]: what each byte of a channel becomes."""
    mean, spread = (torch.tensor(values)[:, None] for values in (_MEAN, _SPREAD))
    return ((torch.arange(256).float() / 255 - mean) / spread).numpy()
