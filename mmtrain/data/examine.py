"""Samples looked at as training does: what builds, indexes or verifies shards refuses the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Examined:
    """A sample that trains: its id, and its row of the index as bytes."""

    id: str
    row: bytes


def examine_records(
    descriptor: int, shard: int, extents: Iterable[Extent], task: Task
) -> Iterator[Examined | DataError]:
    """Each record of a shard file in its order, by threads: Pillow releases the GIL."""

    def look(extent: Extent) -> Examined | DataError:
        try:
            return _examine(descriptor, shard, extent, task)
        except DataError as fault:
            return fault

    with ThreadPoolExecutor() as pool:
        yield from pool.map(look, extents)


def look_at(sample: Sample, task: Task) -> None:
    """Open its images and ask it in every way; what keeps it from training is an error."""
    open_images(sample)
    for template in task.templates.values():
        render(template, sample)


def _examine(descriptor: int, shard: int, extent: Extent, task: Task) -> Examined:
    offset, size = extent
    if size > MAX_RECORD_BYTES:
        raise DataError(
            f"the sample at byte {offset} has {size} bytes, more than {MAX_RECORD_BYTES};",
            "use fewer or smaller images.",
        )
    record = read_at(descriptor, offset, size)
    sample = decode_sample(unpack_members(record))
    look_at(sample, task)
    row = (
        shard,
        offset,
        size,
        num_characters(sample),
        sample_key(sample.id),
        np.frombuffer(image_digest(sample), dtype=np.uint8),
        np.frombuffer(short_digest([record]), dtype=np.uint8),
    )
    return Examined(sample.id, np.array([row], dtype=INDEX_DTYPE).tobytes())
