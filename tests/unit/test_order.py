"""The keyed order: pinned values, permutations, and independence of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest

from mmtrain.data.order import epoch_order, keyed_hash, sample_key

_MASK = 2**64 - 1


def _splitmix64(state: int) -> int:
    """The published algorithm in plain integers: an independent reference."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def test_reference_is_splitmix64() -> None:
    # First output of the published generator for seed 0.
    assert _splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 1), (2**31 - 1, 1000)])
def test_hash_agrees_with_plain_integers(seed: int, epoch: int) -> None:
    golden = 0x9E3779B97F4A7C15
    start = _splitmix64((_splitmix64(seed) + epoch * golden) & _MASK)
    expected = [_splitmix64((start + index * golden) & _MASK) for index in range(50)]
    assert keyed_hash(seed, epoch, np.arange(50)).tolist() == expected


def test_golden_orders() -> None:
    # A change here changes every run: resumed runs would see other samples.
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert epoch_order(10, seed=42, epoch=1).tolist() == [0, 3, 9, 8, 6, 5, 2, 7, 1, 4]
    assert sample_key("a") == 3405396810240292928
    assert sample_key("digits-0001") == 8147380061512857333


@pytest.mark.parametrize("num_samples", [0, 1, 2, 1000])
def test_every_sample_once(num_samples: int) -> None:
    order = epoch_order(num_samples, seed=7, epoch=3)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_samples))


def test_seeds_and_epochs_differ_and_nothing_is_left_in_place() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, order in enumerate(orders):
        for other in orders[number + 1 :]:
            # Two random permutations agree in about one place.
            assert (order == other).sum() < 10


def test_no_warning_from_overflow() -> None:
    with np.errstate(all="raise"):
        epoch_order(100, seed=2**31 - 1, epoch=10**6)


def test_sample_keys_fit_in_63_bits_and_differ() -> None:
    keys = {sample_key(f"sample-{number}") for number in range(10_000)}
    assert len(keys) == 10_000
    assert all(0 <= key < 2**63 for key in keys)
