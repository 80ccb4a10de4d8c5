"""The order of data that exceed the cache: whole shards come and go, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmtrain.data.manifest import FORMAT_VERSION, Manifest, ShardInfo, shard_name
from mmtrain.data.mixture import Mixture
from mmtrain.data.order import epoch_order
from mmtrain.data.plan import Layout, Planner
from mmtrain.data.windows import Share, windows_for
from mmtrain.errors import ConfigError

SEED = 7
DOCS = Path(__file__).resolve().parents[2] / "docs" / "shards.md"


def share(num_shards: int, per_shard: int, limit: int | None = None, remote: bool = True) -> Share:
    """Shards of ten bytes a sample."""
    shards = tuple(
        ShardInfo(
            name=shard_name(number),
            samples=per_shard,
            members=per_shard,
            bytes=10 * per_shard,
            sha256="0" * 64,
        )
        for number in range(num_shards)
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        task="digits",
        split="train",
        seed=0,
        limit=None,
        build_options={},
        samples=num_shards * per_shard,
        shards=shards,
        index_sha256="0" * 64,
    )
    return Share(manifest, limit or manifest.samples, remote)


def mixture(shares: list[Share], max_bytes: int, *weights: float) -> Mixture:
    sizes = tuple(one.num_samples for one in shares)
    return Mixture(sizes, weights or (1.0,) * len(shares), windows_for(shares, [], max_bytes))


def test_what_fits_has_the_order_that_it_has_here() -> None:
    fits = mixture([share(10, 8)], 800)
    assert fits.windows is None
    assert fits.order(SEED, 3).tolist() == epoch_order(80, SEED, 3).tolist()
    local = windows_for([share(10, 8, remote=False)], [], 1)
    assert local is None, "shards on this machine need no cache"
    assert windows_for([share(10, 8, limit=17)], [], 240) is None, "only what is read counts"
    assert share(10, 8, limit=17).num_bytes == 240


def test_windows_are_whole_shards_within_half_of_the_cache() -> None:
    one = share(10, 8)
    moving = mixture([one], 600)
    assert moving.windows is not None and moving.windows.most == 300
    seen = []
    for epoch in range(3):
        order = moving.order(SEED, epoch)
        assert sorted(order.tolist()) == list(range(80)), "every sample once"
        window = moving.windows_in_order(SEED, epoch)
        assert (np.diff(window) >= 0).all() and window.max() == 3
        members = [set((order[window == number] // 8).tolist()) for number in range(4)]
        assert [len(shards) for shards in members] == [3, 3, 3, 1]
        assert set().union(*members) == set(range(10))
        inside = [order[window == number].tolist() for number in range(4)]
        assert all(part != sorted(part) for part in inside), "mixed inside"
        seen.append(members)
    assert seen[0] != seen[1] != seen[2], "each epoch has windows of its own"
    assert not np.array_equal(moving.order(SEED, 0), moving.order(SEED + 1, 0))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_resumes_change_nothing(world_size: int) -> None:
    """A step is a function of its number: no step before it is needed, on any rank."""
    moving = mixture([share(10, 8)], 600)
    planner = Planner(80, Layout(world_size, 0, 2, 16), SEED, mixture=moving)
    again = Planner(80, Layout(1, 0, 16, 16), SEED, mixture=mixture([share(10, 8)], 600))
    for position in (13, 4, 0):
        found = [i for step in planner.plan(position).bins for one in step for i in one]
        assert found == [i for step in again.plan(position).bins for one in step for i in one]


def test_small_and_local_sets_of_a_mix_come_in_every_window() -> None:
    large, small, local = share(12, 8), share(1, 24), share(1, 24, remote=False)
    mixed = mixture([large, small, local], 720, 1.0, 2.0, 0.5)
    assert mixed.windows is not None and mixed.windows.most == (720 - 240) // 2
    order, window = mixed.order(SEED, 0), mixed.windows_in_order(SEED, 0)
    counts = Counter(order.tolist())
    assert [counts[n] for n in range(96)] == [1] * 96
    assert [counts[n] for n in range(96, 120)] == [2] * 24, "two passes"
    assert sum(counts[n] for n in range(120, 144)) == 12, "half of one"
    assert window.max() == 3
    for number in range(4):
        inside = order[window == number]
        assert ((inside >= 96) & (inside < 120)).any() and (inside >= 120).any()


def test_a_cache_that_is_too_small_says_what_is_enough() -> None:
    train, val = [share(10, 8), share(1, 8)], [share(2, 10)]
    with pytest.raises(ConfigError, match="data.cache_gib: .* give at least 3.353e-07"):
        windows_for(train, val, 359)
    enough = windows_for(train, val, 360)
    assert enough is not None and enough.most == 80
    with pytest.raises(ConfigError, match="at least"):
        windows_for([share(1, 8, remote=False)], val, 100)


def test_the_cut_has_a_name() -> None:
    shares = [share(10, 8)]
    digests = [windows_for(shares, [], size) for size in (600, 600, 602)]
    first, same, other = [found.digest if found else "" for found in digests]
    assert first == same != other


def mixing(per_window: int) -> str:
    """A row: 200 shards with 500 samples each, so many of them in a window, batches of 128.

    How far apart two samples of a shard come, as a share of the epoch; shards in a batch; how much
    the mean of a batch varies of something that is the same within a shard, against chance.
    """
    num_shards, per_shard, batch = 200, 500, 128
    moving = mixture([share(num_shards, per_shard)], 2 * per_window * per_shard * 10)
    order = moving.order(SEED, 0)
    places = np.argsort(order).reshape(num_shards, per_shard)
    apart = np.abs(np.diff(places)).mean() / len(order)
    batches = _shards_of_batches(order // per_shard, batch)
    distinct = np.mean([len(set(one.tolist())) for one in batches])
    variances = []
    for epoch in range(8):
        shards = _shards_of_batches(moving.order(SEED, epoch) // per_shard, batch)
        variances.append((shards < num_shards // 2).mean(axis=1).var())
    spread = np.mean(variances) ** 0.5 / (0.5 / batch**0.5)
    windows = moving.windows_in_order(SEED, 0)[-1] + 1
    return f"| {windows} | {per_window} | {100 * apart:.1f} % | {distinct:.0f} | {spread:.1f} |"


def _shards_of_batches(shards: np.ndarray, batch: int) -> np.ndarray:
    return shards[: len(shards) // batch * batch].reshape(-1, batch)


def test_the_documented_effect_on_mixing_is_what_is_measured() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [mixing(per_window) for per_window in (200, 50, 20, 10, 4)]
    assert [row for row in rows if row not in text] == []
