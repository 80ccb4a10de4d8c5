"""What a forward and a backward pass hold at once and compute, counted on the meta device.

Nothing is computed there, but every tensor is made, saved for backward and freed as on a GPU:
what a model keeps is watched, not described by a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as functional
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmtrain.models import decoding
from mmtrain.models.interface import Batch, Family


@dataclass(frozen=True)
class Watched:
    """One forward and backward pass."""

    peak_bytes: int  # the most that is alive beside parameters, gradients, buffers and batch
    flops: int  # of matrix products, convolutions and attention


def watch(family: Family, model: nn.Module, batch: Batch, flash_attention: bool) -> Watched:
    """A training step's passes without its optimizer.

    All are on the meta device. The model is left in training mode, with its gradients dropped.
    """
    model.train()
    parameters = list(model.parameters())
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in parameters
        if parameter.requires_grad
    ]
    counted = LiveBytes([*parameters, *model.buffers(), *batch.tensors.values()])
    try:
        with _gpu_attention(flash_attention), _MasksAreMade(), counted:
            found = decoding.forward(family, model, batch)
            loss = sum(found.auxiliary.values(), found.answer_loss_sum)
            if loss.requires_grad:
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Watched(counted.peak, counted.flops)


def _drop_gradient(parameter: torch.Tensor) -> None:
    """As ZeRO does: it adds gradients to buffers of its own as they come."""
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made inside and still in use, and the operations of products."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self.flops = 0
        self._now = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operator and count what it made; views share a storage."""
        made = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(getattr(func, "_overloadpacket", None)):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class _MasksAreMade(TorchFunctionMode):
    """As for a batch of different lengths: whether one is needed, nobody can look on meta."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """One call of torch's."""
        if func is torch.Tensor.__bool__ and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


@contextmanager
def _gpu_attention(flash_attention: bool) -> Iterator[None]:
    """A fused kernel, which keeps no table of weights; on meta torch would write it out.

    The function itself is exchanged: recomputed blocks run where no TorchFunctionMode reaches.
    """
    written_out = functional.scaled_dot_product_attention
    fused = partial(_fused_attention, flash_attention)
    setattr(functional, "scaled_dot_product_attention", fused)
    try:
        yield
    finally:
        setattr(functional, "scaled_dot_product_attention", written_out)


def _fused_attention(
    flash_attention: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's choice on a GPU: flash without a mask in half precision, else memory-efficient."""
    if flash_attention:
        attn_mask = None  # that package cuts padding out instead
    if enable_gqa:
        copies = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(copies, dim=1) for one in (key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # every call makes an additive one of it
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
