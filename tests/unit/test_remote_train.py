"""Training from URLs: the same bits as from a folder, and windows where the cache is small."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmtrain.commands import check
from mmtrain.config.load import load_run_file
from mmtrain.data import ahead as ahead_module
from mmtrain.data import remote
from mmtrain.data.ahead import Ahead
from mmtrain.data.cache import GIB, Blob, ShardCache
from mmtrain.data.manifest import read_manifest
from mmtrain.data.mixture import Mixture
from mmtrain.data.plan import Layout, Planner
from mmtrain.data.remote import RemoteFolder
from mmtrain.data.windows import Share, windows_for
from mmtrain.errors import ConfigError
from mmtrain.resolve import resolve
from tests import tiny
from tests.distributed.jobs import Interrupted
from tests.in_process import one_rank, train, trained_digest
from tests.s3 import BUCKET, Store, build_small_shards, gib_for, push_all, serving

SEED = 7
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_shards(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def store(digits: Path) -> Iterator[Store]:
    with serving() as started:
        push_all(digits)
        yield started


def run_of(base: Path, digits: Path, folder: Path, url: str = "", **data: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "optim": {"global_batch": 8, "micro_batch": 4, "max_steps": 9},
        "validate": {"every": 5},
        "checkpoint": {"every_steps": 2},
        "generation": {"max_new_tokens": 1, "batch_size": 4},
    }
    run = tiny.run_data(base, digits, folder, **sections)
    places = {split: f"{url}/{split}" if url else str(digits / split) for split in SPLITS}
    run["data"] = {"task": "digits", "workers": 2, **places, **data}
    return run


def losses(folder: Path) -> list[float]:
    return tiny.read_metrics(folder, "train/loss")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digits: Path, store: Store
) -> Path:
    """From the folder; from the store; in windows; and the same cut and gone on."""
    root, url = tmp_path_factory.mktemp("trained"), f"s3://{BUCKET}"

    def stop(step: int, metrics: dict[str, float]) -> None:
        raise Interrupted

    def run(name: str, url: str = "", **data: Any) -> dict[str, Any]:
        return run_of(tiny_checkpoint, digits, root / name, url, **data)

    # Nothing is read ahead of a step: windows of three shards are smaller than that would be.
    windows = {"cache_gib": gib_for(digits, 6), "workers": 0}
    with one_rank():
        train(run("here"))
        train(run("there", url, cache_dir=str(root / "cache")))
        store.gets.clear()
        train(run("windows", url, cache_dir=str(root / "cache-w"), **windows))
        (root / "gets.json").write_text(json.dumps(store.gets))
        cut = run("cut", url, cache_dir=str(root / "cache-c"), **windows)
        with pytest.raises(Interrupted):
            train(cut, stop)
        with pytest.raises(
            ConfigError, match="data.cache_gib.windows: has changed since the checkpoint"
        ):
            train(cut | {"data": cut["data"] | {"cache_gib": 1}})
        # Another folder of another host, and more threads: neither is part of the run.
        train(cut | {"data": cut["data"] | {"cache_dir": str(root / "cache-d"), "workers": 2}})
    return root


def test_a_url_trains_as_the_folder_does(trained: Path) -> None:
    assert losses(trained / "there") == losses(trained / "here") and len(losses(trained / "here"))
    assert trained_digest(trained / "there") == trained_digest(trained / "here")
    here, there = (
        json.loads((trained / name / "checkpoints" / "step-8" / "state.json").read_text())["inputs"]
        for name in ("here", "there")
    )
    assert there == here | {"data.cache_gib.windows": "none"}
    for file in trained.rglob("*"):
        if file.suffix in (".yaml", ".log", ".json", ".jsonl"):
            assert "very-secret" not in file.read_text()


def test_windows_train_on_and_a_resume_changes_nothing(trained: Path, digits: Path) -> None:
    assert len(losses(trained / "windows")) == 9
    assert losses(trained / "windows") != losses(trained / "here"), "another order"
    assert losses(trained / "cut") == losses(trained / "windows")
    assert trained_digest(trained / "cut") == trained_digest(trained / "windows")
    bound = gib_for(digits, 6) * GIB
    held = [path.stat().st_size for path in (trained / "cache-w").iterdir()]
    assert 0 < sum(held) <= bound
    gets = json.loads((trained / "gets.json").read_text())
    tars = {name: count for name, count in gets.items() if name.endswith(".tar")}
    # One epoch and a half, and validation, whose shards have the names of two of these.
    assert len(tars) == 12 and sum(tars.values()) <= 12 + 6 + 2


def test_check_says_what_is_to_be_fetched(
    tiny_checkpoint: Path,
    digits: Path,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    check.configure(parser)
    said = []
    sizes = {"cache_dir": str(tmp_path / "cache"), "cache_gib": gib_for(digits, 6)}
    for data in (sizes, sizes | {"cache_gib": 1}):
        run = run_of(tiny_checkpoint, digits, tmp_path / "run", f"s3://{BUCKET}", **data)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        assert check.run(parser.parse_args([str(tmp_path / "run.yaml")])) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "(48 training samples)" in said[0] and "an epoch moves through 4 windows" in said[0]
    assert "still to be fetched into" in said[1] and "windows" not in said[1]
    with pytest.raises(ConfigError, match="data.cache_gib: .* give at least"):
        arguments = [str(tmp_path / "run.yaml"), f"data.cache_gib={gib_for(digits, 1)}"]
        check.run(parser.parse_args(arguments))


def test_a_url_that_cannot_be_is_told_with_all_else(tiny_checkpoint: Path, digits: Path) -> None:
    run = run_of(tiny_checkpoint, digits, Path("x"), "sftp://me:hunter2@host")
    run["optim"]["global_batch"] = 7
    with pytest.raises(ConfigError) as caught:
        resolve(run)
    text = str(caught.value)
    assert text.count("with a password") == 2 and "data.val: a URL" in text
    assert "optim.global_batch: 7" in text and "hunter2" not in text


class Order:
    """Remembers what it is told to fetch."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.wanted: list[list[str]] = []

    def want(self, blobs: Any) -> None:
        self.wanted.append([blob.name for blob in blobs])


def test_shards_are_asked_for_in_the_order_of_need(digits: Path, tmp_path: Path) -> None:
    manifest, _ = read_manifest(digits / "train")
    share = Share(manifest, 48, True)
    cache = ShardCache(tmp_path, int(6 * max(shard.bytes for shard in manifest.shards)))
    mixture = Mixture((48,), (1.0,), windows_for([share], [], cache.max_bytes))
    planner = Planner(48, Layout(1, 0, 8, 8), SEED, mixture=mixture)
    folder = RemoteFolder("memory://x")
    blobs = [Blob(folder, one.name, one.bytes, one.sha256) for one in manifest.shards]
    always = [Blob(folder, "val.tar", 1, "1" * 64)]
    told = Order(cache)
    ahead = Ahead(planner, mixture, told, blobs, share.shard_of, always)  # type: ignore[arg-type]

    for position in range(9):
        ahead.reach(position, 9)
    # Six steps an epoch, 12 samples a window: windows begin at samples 0, 12, 24, 36.
    windows = [mixture.windows_in_order(SEED, epoch) for epoch in (0, 1)]
    orders = [mixture.order(SEED, epoch) for epoch in (0, 1)]

    def names(samples: np.ndarray) -> list[str]:
        shards = dict.fromkeys((samples // 4).tolist())
        return [blobs[number].name for number in shards]

    assert windows[0].tolist() == np.repeat(range(4), 12).tolist()
    expected = [
        names(orders[0][:24]),
        names(orders[0][16:36]),
        names(orders[0][24:48]),
        names(np.concatenate([orders[0][40:], orders[1][:12]])),
        names(orders[1][:24]),
        names(orders[1][16:24]),  # no step is taken behind
    ]
    assert told.wanted == [[*one, "val.tar"] for one in expected]
    assert cache.needed == {blob.sha256 for blob in blobs if blob.name in expected[-1]} | {"1" * 64}


def test_what_cannot_be_fetched_ahead_ends_nothing_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAITS_S", ())
    fetcher = ahead_module.Fetcher(ShardCache(tmp_path, 100))
    blobs = [Blob(RemoteFolder("memory://none"), f"{n}.tar", n, f"{n}" * 64) for n in range(1, 8)]
    fetcher.want(blobs)
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()
    assert caplog.text.count("not fetched ahead") == len(blobs)


def test_the_run_file_keeps_the_url(trained: Path) -> None:
    data = load_run_file(trained / "windows" / "run.yaml").data
    assert data is not None and data.train == f"s3://{BUCKET}/train"
