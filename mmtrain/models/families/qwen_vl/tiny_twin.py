"""Tiny checkpoints of the real classes in the published layout, with a tokenizer of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.models.families.qwen_vl.configuration import QWenConfig
from mmtrain.models.families.qwen_vl.encoding import SYSTEM
from mmtrain.models.families.qwen_vl.processing import make_processor
from mmtrain.models.families.qwen_vl.tokenizer import IMAGE_START, train
from mmtrain.models.weights import initialise_weights

NUM_ORDINARY_TOKENS = 448
_ROUND_TO = 64  # published embeddings have more rows than the tokenizer has tokens
# Near one over the root of the width: with the usual 0.02 so narrow a model learns slowly.
WEIGHT_SPREAD = 0.1


def write(family: Any, config: QWenConfig, texts: Sequence[str], seed: int, folder: Path) -> None:
    """Weights, configuration and tokenizer of a tiny model."""
    words = ["system\nuser\nassistant\nPicture 1: \nPicture 2: ", SYSTEM]
    tokenizer = train([*texts, *words], NUM_ORDINARY_TOKENS)
    config.vocab_size = -(-len(tokenizer) // _ROUND_TO) * _ROUND_TO
    assert config.visual is not None
    config.visual["image_start_id"] = tokenizer.special[IMAGE_START]
    folder.mkdir(parents=True, exist_ok=True)
    model = family.skeleton(config).to(torch.float32)
    initialise_weights(dict(model.named_parameters()), seed, WEIGHT_SPREAD)
    family.set_fixed_positions(model)
    model.save_pretrained(str(folder))
    make_processor(tokenizer, config).save_pretrained(str(folder))
