"""Tiny checkpoints of the real classes in the published layout, with a tokenizer of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmtrain.models import tiny
from mmtrain.models.families.qwen_vl.configuration import QWenConfig
from mmtrain.models.families.qwen_vl.encoding import SYSTEM
from mmtrain.models.families.qwen_vl.processing import make_processor
from mmtrain.models.families.qwen_vl.tokenizer import IMAGE_START, train

NUM_ORDINARY_TOKENS = 448
_ROUND_TO = 64  # published embeddings have more rows than the tokenizer has tokens


def write(
    skeleton: tiny.Skeleton,
    finish: Callable[[Any], None],
    config: QWenConfig,
    texts: Sequence[str],
    seed: int,
    folder: Path,
) -> None:
    """Weights, configuration and tokenizer of a tiny model."""
    words = ["system\nuser\nassistant\nPicture 1: \nPicture 2: ", SYSTEM]
    tokenizer = train([*texts, *words], NUM_ORDINARY_TOKENS)
    config.vocab_size = -(-len(tokenizer) // _ROUND_TO) * _ROUND_TO
    assert config.visual is not None
    config.visual["image_start_id"] = tokenizer.special[IMAGE_START]
    tiny.write_model(skeleton, config, folder, seed, tiny.NARROW_SPREAD, finish)
    make_processor(tokenizer, config).save_pretrained(str(folder))
