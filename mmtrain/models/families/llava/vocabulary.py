"""Making room for an image token that lies outside the vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MULTIPLE = 64  # as in the published Hugging Face folders: 32000 becomes 32064
_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def with_image_token(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor]
) -> tuple[PretrainedConfig, Mapping[str, torch.Tensor]]:
    """Configuration and tensors whose vocabulary holds the image token, too.

    transformers' own forward looks the token up before it replaces it. New rows are the mean of
    all rows, in the embedding and in the head: no answer is likelier or much less likely for them.
    """
    size = config.text_config.vocab_size
    if config.image_token_id < size:
        return config, state
    wanted = (config.image_token_id // _MULTIPLE + 1) * _MULTIPLE
    padded_config = copy.deepcopy(config)
    padded_config.text_config.vocab_size = wanted
    padded = {name: _padded(state[name], wanted) for name in _ROWS if name in state}
    return padded_config, {**state, **padded}


def _padded(rows: torch.Tensor, wanted: int) -> torch.Tensor:
    rows = rows.detach()
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(wanted - len(rows), -1)])
