"""Dropout whose mask is a function of what is dropped, never of a generator.

Each element's fate is an integer hash of (seed, module, step, sample, token, channel): the same
sample meets the same mask on any rank, in any micro-batch, after any resume.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.nn import functional

from mmtrain.models.dropout_mask import MaskKey, drop, drop_then_linear, to_int32

KEYED_ATTENTION = "mmtrain_keyed"  # the attention implementation that drops by key


def stable_hash(*parts: object) -> int:
    """63 bits that depend on the parts' text alone."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class DropoutScope:
    """What the masks of one run are keyed by: its seed, the step, and the rows in flight."""

    def __init__(self, seed: int) -> None:
        self._seed_and_step = (seed, 0)
        self._step_keys: dict[torch.device, torch.Tensor] = {}
        self._row_keys: dict[str, torch.Tensor] = {}
        self._packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def seed(self) -> int:
        """The run's."""
        return self._seed_and_step[0]

    @seed.setter
    def seed(self, seed: int) -> None:
        self._set(seed, self.step)

    @property
    def step(self) -> int:
        """The optimizer step in which what follows is dropped."""
        return self._seed_and_step[1]

    @step.setter
    def step(self, step: int) -> None:
        self._set(self.seed, step)

    def _set(self, seed: int, step: int) -> None:
        """Written into the same tensors, which kernels read: neither waits for the other."""
        if (seed, step) != self._seed_and_step:
            self._seed_and_step = (seed, step)
            for key in self._step_keys.values():
                key.fill_(self._step_number())

    def _step_number(self) -> int:
        return to_int32(stable_hash(*self._seed_and_step))

    def set_rows(self, component: str, row_keys: torch.Tensor) -> None:
        """Say which sample (or image) each row of a component's activations belongs to."""
        self._row_keys[component] = row_keys

    def set_packed_rows(
        self, component: str, row_keys: torch.Tensor, token_index: torch.Tensor
    ) -> None:
        """Say the same of activations [tokens, channels]: each token's row and index in its row."""
        self._packed[component] = (row_keys, token_index)

    def mask_key(
        self, component: str, module_key: int, probability: float, is_packed: bool
    ) -> MaskKey:
        """The key of a module's mask on the rows in flight.

        Tokens of rows that are not packed count from the left: they are padded on the right.
        """
        index = None
        if is_packed:
            rows, index = self._packed[component]
        else:
            rows = self._row_keys[component]
        step = self._step_keys.get(rows.device)
        if step is None:
            step = torch.full((), self._step_number(), dtype=torch.int32, device=rows.device)
            self._step_keys[rows.device] = step
        return MaskKey(rows, index, step, None, module_key, probability)


def scope_of(model: nn.Module) -> DropoutScope:
    """The model's dropout scope, made on first use."""
    scope = model.__dict__.get("dropout_scope")
    if scope is None:
        scope = model.__dict__["dropout_scope"] = DropoutScope(seed=0)
    return scope


class KeyedDropout(nn.Module):
    """Inverted dropout with a keyed mask on activations [rows, tokens, channels].

    Where rows are packed one after another, these are [tokens, channels].
    """

    kind = "dropout"

    def __init__(self, probability: float, module_name: str, component: str, scope: DropoutScope):
        super().__init__()
        self.p = probability
        self.component = component
        self.module_key = stable_hash(self.kind, module_name)
        self._scope = [scope]  # in a list: the scope is no part of the module tree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop while training; identity otherwise."""
        return drop(x, self._key(x)) if self._drops else x

    def then_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """linear(self(x), weight), for which nothing but x is kept."""
        if self._drops:
            return drop_then_linear(x, weight, self._key(x))
        return functional.linear(x, weight)

    @property
    def _drops(self) -> bool:
        return self.training and self.p > 0.0

    def _key(self, x: torch.Tensor) -> MaskKey:
        scope = self._scope[0]
        return scope.mask_key(self.component, self.module_key, self.p, is_packed=x.dim() == 2)


class KeyedAttentionDropout(KeyedDropout):
    """The same on attention probabilities [rows, heads, queries, keys].

    Its channels are the positions attended to; padding on the right changes no mask.
    """

    kind = "attention dropout"
