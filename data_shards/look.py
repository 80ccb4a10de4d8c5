"""One tar looked through as training reads it: what it holds, and what training would refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest
from io import BufferedReader
from os import SEEK_END
from pathlib import Path

from mmtrain import plugins
from mmtrain.data.examine import examine_records
from mmtrain.data.manifest import ShardInfo
from mmtrain.data.tar import MemberPlace, Run, list_members, runs
from mmtrain.errors import DataError
from mmtrain.files import open_regular

Problem = tuple[int, int, str]  # number of the shard, byte in it, and what is wrong there
OnByte = Callable[[int], None]


@dataclass(frozen=True)
class Looked:
    """What a tar holds, and why training would refuse some of it."""

    info: ShardInfo | None  # None where it is no shard
    rows: bytes = b""  # of INDEX_DTYPE, one for each sample that trains
    problems: tuple[Problem, ...] = ()


def look_through(
    path: Path,
    number: int,
    task: str,
    threads: int | None = None,
    progress: OnByte = lambda end: None,
) -> Looked:
    """Look at every sample of shard number `number` as training of that task does."""
    if not path.name.isprintable():
        fault = f"{str(path)!r} has signs that no manifest names; rename it."
        return Looked(None, problems=((number, 0, fault),))
    try:
        with open(open_regular(path), "rb") as file:
            return _looked(file, path, number, task, threads, progress)
    except OSError as fault:
        unreadable = f"'{path}' is not readable ({fault.strerror})."
        return Looked(None, problems=((number, 0, unreadable),))


def _looked(
    file: BufferedReader,
    path: Path,
    number: int,
    task: str,
    threads: int | None,
    progress: OnByte,
) -> Looked:
    places, found, fault = _framing(file)
    if fault is not None:
        return Looked(None, problems=((number, 0, f"'{path}': {fault}."),))
    extents = [(run.offset, run.end - run.offset) for run in found]
    examined = examine_records(file.fileno(), number, extents, plugins.load("task", task), threads)
    rows, problems = list[bytes](), list[Problem]()
    for run, one in zip(found, examined, strict=True):
        if isinstance(one, DataError):
            problems.append((number, run.offset, f"'{path}': {one}"))
        else:
            rows.append(one.row)
        progress(run.end)
    file.seek(0)
    digest = file_digest(file, "sha256").hexdigest()
    info = ShardInfo(
        name=path.name,
        samples=len(found),
        members=len(places),
        bytes=file.seek(0, SEEK_END),
        sha256=digest,
    )
    return Looked(info, b"".join(rows), tuple(problems))


def _framing(file: BufferedReader) -> tuple[list[MemberPlace], list[Run], str | None]:
    """Members and samples of a tar, and what keeps it from being a shard."""
    places, fault = list_members(file, file.seek(0, SEEK_END))
    found = runs(places)
    if fault is None and len({run.key for run in found}) != len(found):
        fault = "the members of its samples are interleaved; put those of one key side by side"
    if fault is None and not found:
        fault = "it holds no samples; remove it"
    return places, found, fault
