"""linear(dropout(x)) as one function: what one after the other gave, and only x is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmtrain.models.dropout import DropoutScope, KeyedDropout, scope_of, stable_hash
from mmtrain.peft.interface import Linear, Target
from mmtrain.peft.methods.lora import METHOD, LoraOptions

ROWS, TOKENS, WIDTH, RANK = 5, 40, 1000, 6  # more elements than one block of a core
ROW_KEYS = torch.tensor([stable_hash("sample", number) for number in range(ROWS)])
PADDED, PACKED = (ROWS, TOKENS, WIDTH), (ROWS * TOKENS, WIDTH)
PROBABILITY = 0.05


def keyed(probability: float = PROBABILITY) -> KeyedDropout:
    scope = DropoutScope(7)
    scope.step = 3
    scope.set_rows("llm", ROW_KEYS)
    scope.set_packed_rows(
        "llm", ROW_KEYS.repeat_interleave(TOKENS), torch.arange(TOKENS).repeat(ROWS)
    )
    return KeyedDropout(probability, "some.module", "llm", scope).train()


def mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def one_after_the_other(dropout: KeyedDropout, x: torch.Tensor, weight: torch.Tensor) -> Any:
    """The composition, its mask written out: the hash that runs with dropout were trained by."""
    key = dropout.module_key
    low, high = ROW_KEYS.to(torch.int32), (ROW_KEYS >> 32).to(torch.int32)
    rows = mix(mix(low ^ as_int32(key)) ^ high ^ as_int32(key >> 32))
    rows = mix(rows ^ as_int32(stable_hash(7, 3)))
    tokens = torch.arange(TOKENS, dtype=torch.int32) * (0x9E3779B1 - (1 << 32))
    channels = torch.arange(WIDTH, dtype=torch.int32) * 0x7FEB352D
    bits = mix(mix(rows[:, None] ^ tokens)[..., None] ^ channels).view(x.shape)
    kept = bits >= as_int32(int(dropout.p * 2**32) - 2**31)
    return functional.linear(torch.where(kept, x * (1 / (1 - dropout.p)), 0.0), weight)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, and the gradient of what they make."""
    generator = torch.Generator().manual_seed(1)
    shapes = (shape, (RANK, WIDTH), (*shape[:-1], RANK))
    return tuple(
        torch.randn(one, generator=generator, dtype=torch.float64).to(dtype) for one in shapes
    )


@pytest.mark.parametrize("shape", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", ["x weight", "weight", "x"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_compositions(
    shape: tuple[int, ...], trained: str, dtype: torch.dtype
) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for function in (KeyedDropout.then_linear, one_after_the_other):
        x, weight, gradient = tensors(shape, dtype)
        x.requires_grad_("x" in trained.split())
        weight.requires_grad_("weight" in trained)
        out = function(keyed(), x, weight)
        out.backward(gradient)
        of = {"out": out.detach(), "x": x.grad, "weight": weight.grad}
        found.append({name: value for name, value in of.items() if value is not None})
    assert found[0].keys() == found[1].keys() == {"out", *trained.split()}
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name  # 1e-12 was asked for
        assert value.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_meets_the_same_mask(reentrant: bool) -> None:
    gradients = []
    for recomputed in (False, True):
        x, weight, gradient = (one.requires_grad_() for one in tensors(PADDED, torch.float32))
        dropout = keyed()
        if recomputed:
            out = checkpoint(dropout.then_linear, x, weight, use_reentrant=reentrant)
        else:
            out = dropout.then_linear(x, weight)
        out.backward(gradient.detach())
        gradients.append((x.grad, weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_a_step_that_began_before_backward_is_an_error() -> None:
    x, weight, gradient = tensors(PADDED, torch.float32)
    dropout = keyed()
    out = dropout.then_linear(x, weight.requires_grad_())
    dropout._scope[0].step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(gradient)


def test_the_steps_key_stays_where_it_is() -> None:
    """Kernels that were recorded once read the key of each later step from the same address."""
    dropout = keyed()
    scope = dropout._scope[0]
    first = scope.mask_key("llm", 1, 0.5, is_packed=False).step
    before, place = int(first), first.data_ptr()
    scope.step += 1
    again = scope.mask_key("llm", 2, 0.5, is_packed=True).step
    assert again is first and again.data_ptr() == place and int(again) != before
    assert int(again) == as_int32(stable_hash(7, 4))


class Block(nn.Module):
    """Three linears that read one tensor, as queries, keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 8, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def adapted(dropout: float) -> Block:
    model = Block().requires_grad_(False)
    linears = tuple(Linear(name, "attn", name, None, (WIDTH, WIDTH)) for name in "qkv")
    METHOD.attach(
        Target("llm", model, linears=linears, pattern="[qkv]"), LoraOptions(r=2, dropout=dropout), 3
    )
    scope_of(model).set_rows("llm", ROW_KEYS)
    return model.train()


@pytest.mark.parametrize("frozen", [False, True])
def test_linears_that_read_one_tensor_keep_it_once(frozen: bool) -> None:
    kept: dict[int, int] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    model = adapted(0.05)
    x = torch.randn(PADDED, requires_grad=not frozen)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        out = model(x)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    sizes = [size for place, size in kept.items() if place not in weights]
    assert sizes.count(x.untyped_storage().nbytes()) == 1
    assert sum(sizes) < 1.02 * x.untyped_storage().nbytes()
    out.sum().backward()


def test_pefts_own_forward_drops_as_ours() -> None:
    model = adapted(0.5)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            nn.init.normal_(layer.lora_B["llm"].weight)
    x = torch.randn(PADDED)
    ours = model(x)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            del layer.__dict__["forward"]
    torch.testing.assert_close(model(x), ours)
    assert not torch.allclose(model.eval()(x), ours)
