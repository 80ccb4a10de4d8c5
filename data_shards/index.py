"""Manifest and index of a folder of tars, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np

from data_shards.look import Looked, Problem
from data_shards.lookers import Lookers
from mmtrain.data.codec import decode_sample
from mmtrain.data.manifest import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    shard_files,
)
from mmtrain.data.tar import unpack_members
from mmtrain.files import open_regular, read_at, replace_file

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Inventory:
    """What the tars of a folder hold, and why training would refuse some of it."""

    shards: tuple[ShardInfo, ...]
    index: np.ndarray  # of INDEX_DTYPE, a row per sample that trains
    problems: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, looked: Sequence[Looked]) -> Inventory:
        """All tars of a folder together, in which no two samples may share an id."""
        index = np.frombuffer(b"".join(one.rows for one in looked), dtype=INDEX_DTYPE)
        paths = [folder / one.info.name if one.info else folder for one in looked]
        problems = [problem for one in looked for problem in one.problems]
        problems += _shared_ids(paths, index)
        shards = tuple(one.info for one in looked if one.info is not None)
        return cls(shards, index, tuple(text for _, _, text in sorted(problems)))


def take_inventory(
    folder: Path, task: str, progress: OnBytes = lambda done, total: None, workers: int = 1
) -> Inventory:
    """Look at every sample of a folder's tars as training of that task does."""
    paths = [folder / name for name in shard_files(folder)]
    ends = np.cumsum([_num_bytes(path) for path in paths], dtype=np.int64).tolist()
    looked = list[Looked]()
    with Lookers(task, workers) as lookers:
        if len(paths) == 1:
            lookers.look(paths[0], lambda end: progress(end, ends[-1]))
        for path in paths if len(paths) > 1 else ():
            lookers.begin(path)
            looked += lookers.finished()
            progress(ends[len(looked) - 1] if looked else 0, ends[-1])
        for one in lookers.finished(wait=True):
            looked.append(one)
            progress(ends[len(looked) - 1], ends[-1])
    return Inventory.of(folder, looked)


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a link may lead nowhere


def _shared_ids(paths: Sequence[Path], index: np.ndarray) -> Iterator[Problem]:
    """Samples whose id an earlier one has: found by the hashes, as opening a folder does."""
    _, first, which = np.unique(index["id_key"], return_index=True, return_inverse=True)
    for number in np.flatnonzero(first[which] != np.arange(len(index))).tolist():
        row, earlier = index[number], index[first[which[number]]]
        path = paths[row["shard"]]
        yield (
            int(row["shard"]),
            int(row["offset"]),
            f"'{path}': two samples have the id {_id(path, row)!r}, the first in"
            f" {paths[earlier['shard']].name}; give each a JSON with an 'id' of its own.",
        )


def _id(path: Path, row: np.void) -> str:
    with open(open_regular(path), "rb") as file:
        record = read_at(file.fileno(), int(row["offset"]), int(row["size"]))
    return decode_sample(unpack_members(record)).id


def write_manifest(
    folder: Path,
    inventory: Inventory,
    task: str,
    split: str,
    seed: int = 0,
    limit: int | None = None,
    build_options: Mapping[str, object] | None = None,
) -> Manifest:
    """Write the index, then the manifest that pins it and all shards."""
    assert not inventory.problems and len(inventory.index)
    buffer = BytesIO()
    np.save(buffer, inventory.index, allow_pickle=False)
    replace_file(folder / INDEX_NAME, buffer.getvalue(), sync=True)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        task=task,
        split=split,
        seed=seed,
        limit=limit,
        build_options=dict(build_options or {}),
        samples=len(inventory.index),
        shards=inventory.shards,
        index_sha256=sha256(buffer.getvalue()).hexdigest(),
    )
    replace_file(folder / MANIFEST_NAME, manifest.to_json(), sync=True)
    return manifest
