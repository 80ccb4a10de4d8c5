"""LoRA that starts at a part of the weight: PiSSA and OLoRA, on a base that stays as it is.

Both take s B A out of the frozen weight and train it. Here the weight keeps it, and the start is
taken off what the adapter gives: W x + s (B A - B0 A0) x. The model equals its base at first,
sharded weights stay sharded, and what is exported fits the published base.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mmtrain.distributed import gathered
from mmtrain.models.dropout import stable_hash

# Of wider matrices the SVD is randomised, in as many iterations as peft's pissa_niter_16.
_WIDTH_OF_EXACT, _ITERATIONS = 1024, 16


def start_from_weight(layer: Any, name: str, kind: str, seed: int, module_name: str) -> None:
    """Set A and B, and keep them as they start; B's start is kept negative, to be added."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    weight = layer.base_layer.weight
    with torch.no_grad(), gathered([weight]):
        if not weight.is_meta:
            factors = _pissa if kind == "pissa" else _olora
            of_a, of_b = factors(
                weight.float(), len(a.weight), layer.scaling[name], seed, module_name
            )
            a.weight.copy_(of_a)
            b.weight.copy_(of_b)
        a.register_buffer("start", a.weight.detach().clone())
        b.register_buffer("start", -b.weight.detach())
    setattr(layer, "get_delta_weight", partial(_delta, layer))


def _pissa(
    weight: torch.Tensor, rank: int, scaling: float, seed: int, module_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest singular values, half of each on either side."""
    if min(weight.shape) <= _WIDTH_OF_EXACT:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash("pissa", seed, module_name))
            left, values, right = torch.svd_lowrank(weight, q=rank, niter=_ITERATIONS)
    roots = (values / scaling).sqrt()
    return roots.unsqueeze(1) * right.T, left * roots


def _olora(weight: torch.Tensor, rank: int, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The first columns of Q, the first rows of R."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def of_start(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """What the adapter gave at its start, negative; the same dropout on what it reads."""
    a, b = layer.lora_A[name].start.to(x.dtype), layer.lora_B[name].start.to(x.dtype)
    narrow = layer.lora_dropout[name].then_linear(x, a)
    return functional.linear(narrow * layer.scaling[name], b)


def _delta(layer: Any, name: str) -> torch.Tensor:
    """What merging adds to the weight, and unmerging takes from it."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    return type(layer).get_delta_weight(layer, name) + layer.scaling[name] * (b.start @ a.start)
