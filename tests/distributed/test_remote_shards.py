"""Two ranks of one host read from a store: each shard comes once, the samples are those of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs as run_jobs
from tests.distributed.test_invariants import SPLIT_TOLERANCE, Runs, close
from tests.in_process import one_rank
from tests.s3 import BUCKET, Store, build_small_shards, gib_for, push_all, serving


def remote(runs: Runs, name: str, **sections: Any) -> dict[str, Any]:
    """A run of one epoch in windows of three of the twelve shards."""
    data = {
        "train": f"s3://{BUCKET}/train",
        "limit": None,
        "workers": 0,
        "cache_dir": str(runs.root / f"cache-{name}"),
        "cache_gib": gib_for(runs.digits, 6) - gib_for(runs.digits, 0),
    }
    return runs.job(name, **{**sections, "data": {**data, **sections.get("data", {})}})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Path]]:
    digits = build_small_shards(tmp_path_factory.mktemp("digits"))
    with serving() as started:
        push_all(digits)
        yield started, digits


def test_ranks_share_what_is_fetched_and_see_the_same_samples(
    store: tuple[Store, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    runs = Runs(tmp_path, tiny_checkpoint, store[1])
    store[0].gets.clear()
    runs.go("two", 2, [remote(runs, "two")])
    gets = {name: count for name, count in store[0].gets.items() if name.endswith(".tar")}
    assert gets == {name: 1 for name in gets} and len(gets) == 12, "once for both, in one epoch"
    with one_rank():
        run_jobs.train(remote(runs, "one"))
        run_jobs.train(remote(runs, "balanced", data={"cut": "balanced"}))
    assert len(runs.losses("one")) == 6
    assert close(runs.losses("two"), runs.losses("one"), SPLIT_TOLERANCE)
    assert close(runs.losses("balanced"), runs.losses("one"), SPLIT_TOLERANCE)
    state = [
        json.loads((tmp_path / name / "checkpoints" / "step-6" / "state.json").read_text())
        for name in ("one", "two", "balanced")
    ]
    assert len({one["inputs"]["data.cache_gib.windows"] for one in state}) == 1
