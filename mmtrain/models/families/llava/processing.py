"""Tokenizer and image side of a checkpoint folder, with what encoding needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtrain.models.families.llava import prompts
from mmtrain.models.families.llava.shapes import tokens_per_image

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Processor:
    """What encoding needs of a checkpoint folder."""

    hf: Any  # transformers' processor; None where nothing is encoded
    image_token_id: int
    tokens_per_image: int
    num_cue_tokens: int
    image_gap: str  # between an image's tokens and the text behind them
    image_size: int

    @property
    def tokenizer(self) -> Any:
        """Of all texts."""
        return self.hf.tokenizer

    @property
    def image_processor(self) -> Any:
        """Resizes and normalises squares."""
        return self.hf.image_processor

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end of an answer."""
        return (self.tokenizer.eos_token_id,)

    def save_pretrained(self, folder: str) -> None:
        """The files that transformers reads."""
        self.hf.save_pretrained(folder)


def make_processor(hf: Any, config: PretrainedConfig) -> Processor:
    """The facts of transformers' processor and this configuration."""
    return Processor(
        hf=hf,
        image_token_id=config.image_token_id,
        tokens_per_image=tokens_per_image(config),
        num_cue_tokens=prompts.num_cue_tokens(hf.tokenizer),
        image_gap=prompts.gap_behind_images(hf.tokenizer),
        image_size=config.vision_config.image_size,
    )
