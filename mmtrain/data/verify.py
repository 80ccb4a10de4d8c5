"""The full check of a shard folder: every byte against the manifest, every tar header walked.

Tar readers stop without a word at a damaged header (an open CPython fault), so the number of
members is counted here and never taken from what a reader happens to return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmtrain.data.codec import BLOCK_BYTES, parse_header, short_digest
from mmtrain.data.manifest import (
    ShardInfo,
    read_index,
    read_manifest,
    sample_name,
    surplus_shards,
)
from mmtrain.errors import DataError

_CHUNK_BYTES = 2**20
_NAMED_AT_MOST = 5

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class _Member:
    key: str
    offset: int
    end: int


def verify_folder(folder: Path, progress: Progress | None = None) -> list[str]:
    """Every problem of a shard folder, each naming its file; an empty list if there is none."""
    try:
        manifest, _ = read_manifest(folder)
    except DataError as fault:
        return [str(fault)]
    problems = [
        f"'{folder / name}' is not in the manifest; remove it, or build the folder again."
        for name in surplus_shards(folder, manifest)
    ]
    index: np.ndarray | None = None
    try:
        index = read_index(folder, manifest)
    except DataError as fault:
        problems.append(str(fault))
    done = 0
    for number, shard in enumerate(manifest.shards):
        rows = None if index is None else index[index["shard"] == number]
        first_sample = sum(before.samples for before in manifest.shards[:number])
        problems += _verify_shard(folder / shard.name, shard, rows, first_sample)
        done += shard.bytes
        if progress is not None:
            progress(done, manifest.num_bytes)
    return problems


def _verify_shard(
    path: Path, shard: ShardInfo, rows: np.ndarray | None, first_sample: int
) -> list[str]:
    """The problems of one shard file."""
    try:
        with path.open("rb") as file:
            faults = _content_faults(file, shard, rows, first_sample)
    except OSError as fault:
        return [f"'{path}' is not readable ({fault.strerror}); copy it again."]
    if not faults:
        return []
    return [f"'{path}': {', '.join(faults)}; copy it again, or build the folder again."]


def _content_faults(
    file: BinaryIO, shard: ShardInfo, rows: np.ndarray | None, first_sample: int
) -> list[str]:
    faults = []
    num_bytes, digest = _digest(file)
    if num_bytes != shard.bytes:
        faults.append(f"{num_bytes} bytes instead of {shard.bytes}")
    if digest != shard.sha256:
        faults.append("its sha256 is not the one in the manifest")
        if rows is not None:
            faults += _damaged_samples(file, rows, first_sample)
    return faults + _layout_faults(file, num_bytes, shard, rows, first_sample)


def _digest(file: BinaryIO) -> tuple[int, str]:
    digest, num_bytes = sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def _damaged_samples(file: BinaryIO, rows: np.ndarray, first_sample: int) -> list[str]:
    """Which samples of a shard differ from what was built."""
    damaged = []
    for number, row in enumerate(rows):
        file.seek(int(row["offset"]))
        record = file.read(int(row["size"]))
        if short_digest([record]) != row["record_digest"].tobytes():
            damaged.append(sample_name(first_sample + number))
    if not damaged:
        return []
    return [f"{len(damaged)} of {len(rows)} samples are damaged ({_listed(damaged)})"]


def _layout_faults(
    file: BinaryIO, num_bytes: int, shard: ShardInfo, rows: np.ndarray | None, first_sample: int
) -> list[str]:
    """Faults of the tar framing: lost, cut or interleaved members."""
    members, fault = _walk(file, num_bytes)
    faults = [fault] if fault else []
    if len(members) != shard.members:
        faults.append(f"{len(members)} members instead of {shard.members}")
    runs = _runs(members)
    if len(runs) != len({run.key for run in runs}):
        faults.append("the members of its samples are interleaved")
    elif len(runs) != shard.samples:
        faults.append(f"{len(runs)} samples instead of {shard.samples}")
    elif rows is not None and not _agree(runs, rows, first_sample):
        faults.append("its samples do not lie where the index says")
    return faults


def _walk(file: BinaryIO, num_bytes: int) -> tuple[list[_Member], str | None]:
    """All members by their headers, and what is wrong if the walk does not end well."""
    members: list[_Member] = []
    position = 0
    while position < num_bytes:
        file.seek(position)
        block = file.read(BLOCK_BYTES)
        if not any(block):
            return members, _tail_fault(file, position)
        try:
            name, size = parse_header(block)
        except DataError as fault:
            return members, f"at byte {position}: {fault.fault.rstrip(';')}"
        end = position + BLOCK_BYTES + size + -size % BLOCK_BYTES
        if end > num_bytes:
            return members, f"member {name!r} is cut off at byte {num_bytes}"
        members.append(_Member(name.partition(".")[0], position, end))
        position = end
    return members, f"no end mark at byte {num_bytes}"


def _tail_fault(file: BinaryIO, position: int) -> str | None:
    """After an end mark everything must be zero: a zeroed header looks like an end mark."""
    file.seek(position)
    while chunk := file.read(_CHUNK_BYTES):
        if any(chunk):
            return f"data follows the end mark at byte {position} (a zeroed header?)"
    return None


def _runs(members: Iterable[_Member]) -> list[_Member]:
    """Neighbouring members of one key joined: one run per sample in a healthy shard."""
    runs: list[_Member] = []
    for member in members:
        if runs and runs[-1].key == member.key:
            runs[-1] = _Member(member.key, runs[-1].offset, member.end)
        else:
            runs.append(member)
    return runs


def _agree(runs: list[_Member], rows: np.ndarray, first_sample: int) -> bool:
    found = [(run.key, run.offset, run.end - run.offset) for run in runs]
    expected = [
        (sample_name(first_sample + number), int(row["offset"]), int(row["size"]))
        for number, row in enumerate(rows)
    ]
    return found == expected


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
