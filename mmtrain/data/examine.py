"""Samples looked at as training does: what builds, indexes or verifies shards refuses the same."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmtrain.data.codec import decode_sample, image_digest, num_characters, short_digest
from mmtrain.data.manifest import INDEX_DTYPE, MAX_RECORD_BYTES
from mmtrain.data.order import sample_key
from mmtrain.data.source import open_images, render
from mmtrain.data.tar import unpack_members
from mmtrain.errors import DataError
from mmtrain.files import read_at
from mmtrain.tasks.interface import Sample, Task

Extent = tuple[int, int]  # offset and size of a record: all tar bytes of one sample
Item = TypeVar("Item")
Made = TypeVar("Made")
_AHEAD_PER_THREAD = 2
_REMEMBERED_IMAGES = 10_000


@dataclass(frozen=True)
class Examined:
    """A sample that trains: its id, and its row of the index as bytes."""

    id: str
    row: bytes


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    make: Callable[[Item], Made], items: Iterable[Item], threads: int | None = None
) -> Iterator[Made]:
    """`make` of every item in their order, by threads (default: all cores), a few items ahead."""
    threads = threads or num_cores()
    if threads == 1:
        yield from map(make, items)
        return
    ahead: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > _AHEAD_PER_THREAD * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def examine_records(
    descriptor: int,
    shard: int,
    extents: Iterable[Extent],
    task: Task,
    threads: int | None = None,
) -> Iterator[Examined | DataError]:
    """Each record of a shard file in its order, by threads: Pillow releases the GIL."""
    intact: set[bytes] = set()

    def look(extent: Extent) -> Examined | DataError:
        try:
            return _examine(descriptor, shard, extent, task, intact)
        except DataError as fault:
            return fault

    yield from in_order(look, extents, threads)


def look_at(sample: Sample, task: Task, intact: set[bytes]) -> bytes:
    """Open its images and ask it in every way; what keeps it from training is an error.

    Returns the digest of its images. Those in `intact` were opened before: questions about one
    picture often follow each other.
    """
    digest = image_digest(sample)
    if digest not in intact:
        open_images(sample)
        if len(intact) >= _REMEMBERED_IMAGES:
            intact.clear()
        intact.add(digest)
    for template in task.templates.values():
        render(template, sample)
    return digest


def _examine(
    descriptor: int, shard: int, extent: Extent, task: Task, intact: set[bytes]
) -> Examined:
    offset, size = extent
    if size > MAX_RECORD_BYTES:
        raise DataError(
            f"the sample at byte {offset} has {size} bytes, more than {MAX_RECORD_BYTES};",
            "use fewer or smaller images.",
        )
    record = read_at(descriptor, offset, size)
    sample = decode_sample(unpack_members(record))
    images = look_at(sample, task, intact)
    row = (
        shard,
        offset,
        size,
        num_characters(sample),
        sample_key(sample.id),
        np.frombuffer(images, dtype=np.uint8),
        np.frombuffer(short_digest([record]), dtype=np.uint8),
    )
    return Examined(sample.id, np.array([row], dtype=INDEX_DTYPE).tobytes())
