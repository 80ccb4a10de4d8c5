"""Learned keys and values in the cache of a stack of decoder layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache


class PrefixTable(nn.Module):
    """[tokens, layers x (key, value) x heads x channels], laid out as peft's.

    Projected, it is what two linears make of a narrow table [tokens, heads x channels].
    """

    def __init__(
        self, tokens: int, layers: int, heads: int, head_dim: int, projected: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.heads = layers, heads
        width, whole = heads * head_dim, 2 * layers * heads * head_dim
        self.weight = nn.Parameter(torch.empty(tokens, width if projected else whole))
        self.first = nn.Linear(width, width) if projected else None
        self.second = nn.Linear(width, whole) if projected else None

    def forward(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[layers, key or value, rows, heads, tokens, channels]."""
        tokens = len(self.weight)
        table: torch.Tensor = self.weight
        if self.first is not None and self.second is not None:
            table = self.second(self.first(table).tanh())
        table = table.to(dtype).view(tokens, self.layers, 2, self.heads, -1)
        return table.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)


def projected(
    table: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """What the linears make of a narrow table: all that is left of them in an exported prefix."""
    hidden = functional.linear(table.float(), first.float(), first_bias.float()).tanh()
    return functional.linear(hidden, second.float(), second_bias.float())


def put_before(stack: nn.Module, table: PrefixTable, count: int) -> None:
    """Have every call of the stack see `count` prefix tokens before its own.

    A cache that is still empty gets them; mask and positions, which callers count without them,
    are moved along. Where no cache is given, as in training, one lives for the call.
    """
    names = list(inspect.signature(stack.forward).parameters)

    def with_prefix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args)) | kwargs
        return (), given | _moved(given, table, count)

    stack.register_forward_pre_hook(with_prefix, with_kwargs=True)


def _moved(given: Mapping[str, Any], table: PrefixTable, count: int) -> dict[str, Any]:
    embeds: torch.Tensor = given["inputs_embeds"]
    cache: Cache | None = given.get("past_key_values")
    if cache is None:  # an empty one is false, too
        cache = DynamicCache()
    rows, num_new, _ = embeds.shape
    mask, num_cached = given.get("attention_mask"), cache.get_seq_length()
    if mask is None:
        own = max(0, num_cached - count) + num_new
        mask = embeds.new_ones(rows, own, dtype=torch.long)
    if num_cached == 0:
        for layer, (key, value) in enumerate(table(rows, embeds.dtype)):
            cache.update(key, value, layer)
    moved: dict[str, Any] = {"past_key_values": cache}
    moved["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], dim=1)
    if given.get("position_ids") is not None:
        moved["position_ids"] = given["position_ids"] + count
    return moved
