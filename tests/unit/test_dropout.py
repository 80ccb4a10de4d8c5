"""Keyed dropout: a mask is a function of (seed, module, step, sample, token, channel) alone."""

from __future__ import annotations

import math

import pytest
import torch

from mmtrain.models.dropout import DropoutScope, KeyedDropout, stable_hash

ROWS, TOKENS, CHANNELS = 8, 64, 128
NAME = "model.layers.0.q_proj"


def keys(*names: str) -> torch.Tensor:
    return torch.tensor([stable_hash(name) for name in names])


ROW_KEYS = keys(*(f"sample-{number}" for number in range(ROWS)))


def kept(
    seed: int = 1,
    step: int = 0,
    name: str = NAME,
    rows: torch.Tensor = ROW_KEYS,
    tokens: int = TOKENS,
    probability: float = 0.5,
    channels: int = CHANNELS,
) -> torch.Tensor:
    """1.0 where an element is kept: [rows, tokens, channels]."""
    scope = DropoutScope(seed)
    scope.step = step
    scope.set_rows("llm", rows)
    module = KeyedDropout(probability, name, "llm", scope).train()
    return (module(torch.ones(len(rows), tokens, channels)) != 0).double()


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_drop_rate(probability: float) -> None:
    for seed in range(3):
        mask = kept(seed=seed, probability=probability)
        deviation = math.sqrt(probability * (1 - probability) / mask.numel())
        assert abs(1 - mask.mean() - probability) < 5 * deviation


@pytest.mark.parametrize("axis", [(1, 2), (0, 2), (0, 1)])
def test_drop_rate_is_even_over_samples_tokens_and_channels(axis: tuple[int, int]) -> None:
    mask = kept()
    counted = mask.mean(axis)
    deviation = math.sqrt(0.25 * len(counted) / mask.numel())
    assert (counted - 0.5).abs().max() < 5 * deviation


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two masks, in standard deviations of independent ones."""
    pairs = torch.stack([first.flatten(), second.flatten()])
    return abs(float(torch.corrcoef(pairs)[0, 1])) * math.sqrt(first.numel())


OTHERS = {
    "seed": lambda: (kept(), kept(seed=2)),
    "step": lambda: (kept(), kept(step=1)),
    "module": lambda: (kept(), kept(name="model.layers.1.q_proj")),
    "sample": lambda: (kept()[:4], kept()[4:]),
    "neighbouring token": lambda: (kept()[:, 1:], kept()[:, :-1]),
    "neighbouring channel": lambda: (kept()[..., 1:], kept()[..., :-1]),
    "channel 16 further": lambda: (kept()[..., 16:], kept()[..., :-16]),
    "token 32 further": lambda: (kept()[:, 32:], kept()[:, :-32]),
    "seed for step": lambda: (kept(seed=1, step=2), kept(seed=2, step=1)),
}


@pytest.mark.parametrize("varied", OTHERS)
def test_masks_are_independent(varied: str) -> None:
    first, second = OTHERS[varied]()
    assert correlation(first, second) < 5


def test_pairs_of_channels_are_independent_over_tokens() -> None:
    mask = kept(tokens=512)  # 4096 draws of 128 channels
    matrix = torch.corrcoef(mask.reshape(-1, CHANNELS).T)
    worst = (matrix - torch.eye(CHANNELS)).abs().max() * math.sqrt(ROWS * 512)
    assert worst < 6, float(worst)  # of 8128 pairs


def test_a_sample_keeps_its_mask_wherever_it_stands() -> None:
    whole = kept()
    order = torch.tensor([5, 0, 7, 2])
    assert torch.equal(kept(rows=ROW_KEYS[order]), whole[order])
    longer = kept(tokens=TOKENS + 40)  # more padding on the right
    assert torch.equal(longer[:, :TOKENS], whole)
    assert torch.equal(kept(rows=ROW_KEYS[3:4]), whole[3:4])


def test_same_sample_twice_in_a_batch_has_one_mask() -> None:
    mask = kept(rows=keys("a", "b", "a"))
    assert torch.equal(mask[0], mask[2]) and not torch.equal(mask[0], mask[1])


def test_golden_mask() -> None:
    # A change here changes every run with dropout: resumed runs would meet other masks.
    bits = kept(rows=keys("golden"), tokens=2, channels=24)[0].int().tolist()
    assert ["".join(map(str, row)) for row in bits] == GOLDEN_BITS


GOLDEN_BITS = ["110111100101000110100011", "010011100110000111100011"]


def test_evaluation_changes_nothing_and_needs_no_rows() -> None:
    module = KeyedDropout(0.5, NAME, "llm", DropoutScope(1)).eval()
    x = torch.randn(2, 3, 4)
    assert module(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_meets_the_same_mask_and_scale(dtype: torch.dtype) -> None:
    scope = DropoutScope(1)
    scope.set_rows("llm", ROW_KEYS)
    module = KeyedDropout(0.25, NAME, "llm", scope).train()
    x = torch.randn(ROWS, TOKENS, CHANNELS, dtype=dtype, requires_grad=True)
    out = module(x)
    out.sum().backward()
    mask = kept(probability=0.25).to(dtype)
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(out, mask * x * (1 / 0.75))
    assert torch.allclose(x.grad, mask * (1 / 0.75), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state()
    kept()
    assert torch.equal(before, torch.get_rng_state())
