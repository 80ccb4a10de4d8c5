"""Manifest and index of a folder of tars, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from io import BufferedReader, BytesIO
from os import SEEK_END
from pathlib import Path

import numpy as np

from mmtrain import plugins
from mmtrain.data.examine import examine_records
from mmtrain.data.manifest import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    shard_files,
)
from mmtrain.data.tar import MemberPlace, Run, list_members, runs
from mmtrain.errors import DataError
from mmtrain.files import open_regular, replace_file
from mmtrain.tasks.interface import Task

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass
class Inventory:
    """What the tars of a folder hold, and why training would refuse some of it."""

    shards: list[ShardInfo] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)  # one per sample, of INDEX_DTYPE
    problems: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)  # id -> shard of its sample


def take_inventory(folder: Path, task_name: str, progress: OnBytes | None = None) -> Inventory:
    """Look at every sample of a folder's tars as training of that task does."""
    task: Task = plugins.load("task", task_name)
    paths = [folder / name for name in shard_files(folder)]
    total = sum(_num_bytes(path) for path in paths)
    inventory, start = Inventory(), 0
    for path in paths:
        if not path.name.isprintable():
            inventory.problems.append(f"{str(path)!r} has signs that no manifest names; rename it.")
            continue
        try:
            with open(open_regular(path), "rb") as file:
                for end in _take_shard(inventory, file, path, task):
                    if progress is not None:
                        progress(start + end, total)
        except OSError as fault:
            inventory.problems.append(f"'{path}' is not readable ({fault.strerror}).")
        start += _num_bytes(path)
    return inventory


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a link may lead nowhere


def _take_shard(
    inventory: Inventory, file: BufferedReader, path: Path, task: Task
) -> Iterator[int]:
    """Add a shard; yields where each of its samples ends."""
    places, found, fault = _framing(file)
    if fault is not None:
        inventory.problems.append(f"'{path}': {fault}.")
        return
    extents = [(run.offset, run.end - run.offset) for run in found]
    looked = examine_records(file.fileno(), len(inventory.shards), extents, task)
    for run, sample in zip(found, looked, strict=True):
        if isinstance(sample, DataError):
            inventory.problems.append(f"'{path}': {sample}")
        elif sample.id in inventory.places:
            inventory.problems.append(
                f"'{path}': two samples have the id {sample.id!r}, the first in"
                f" {inventory.places[sample.id]}; give each a JSON with an 'id' of its own."
            )
        else:
            inventory.places[sample.id] = path.name
            inventory.rows.append(sample.row)
        yield run.end
    file.seek(0)
    digest = file_digest(file, "sha256").hexdigest()
    inventory.shards.append(
        ShardInfo(
            name=path.name,
            samples=len(found),
            members=len(places),
            bytes=file.seek(0, SEEK_END),
            sha256=digest,
        )
    )


def _framing(file: BufferedReader) -> tuple[list[MemberPlace], list[Run], str | None]:
    """Members and samples of a tar, and what keeps it from being a shard."""
    places, fault = list_members(file, file.seek(0, SEEK_END))
    found = runs(places)
    if fault is None and len({run.key for run in found}) != len(found):
        fault = "the members of its samples are interleaved; put those of one key side by side"
    if fault is None and not found:
        fault = "it holds no samples; remove it"
    return places, found, fault


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
    assert not inventory.problems and inventory.rows
    buffer = BytesIO()
    index = np.frombuffer(b"".join(inventory.rows), dtype=INDEX_DTYPE)
    np.save(buffer, index, allow_pickle=False)
    replace_file(folder / INDEX_NAME, buffer.getvalue(), sync=True)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        task=task,
        split=split,
        seed=seed,
        limit=limit,
        build_options=dict(build_options or {}),
        samples=len(index),
        shards=tuple(inventory.shards),
        index_sha256=sha256(buffer.getvalue()).hexdigest(),
    )
    replace_file(folder / MANIFEST_NAME, manifest.to_json(), sync=True)
    return manifest
