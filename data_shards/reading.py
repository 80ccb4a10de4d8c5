"""The samples of a split in the order of its raw files: which are left out, drawn, made smaller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from data_shards.resize import resized
from data_shards.writer import DEFAULT_SAMPLES_PER_SHARD
from mmtrain import plugins
from mmtrain.data.examine import in_order, look_at
from mmtrain.data.order import epoch_order
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, Sample, Task
from mmtrain.tasks.pictures import unread

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Recipe:
    """All that decides what a shard folder holds."""

    task: str
    split: str
    raw: Path | None
    options: BaseModel
    seed: int = 0
    limit: int | None = None
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    droppable: float = 0.0  # the share of raw samples that may be left out
    resize: int | None = None  # pixels of the shortest side of larger pictures

    @property
    def build_options(self) -> dict[str, object]:
        """What the manifest tells of it beside task, split, seed and limit."""
        options = self.options.model_dump(mode="json")
        return options if self.resize is None else {**options, "resize": self.resize}


@dataclass
class LeftOut:
    """Raw samples that are none here: how many for each reason, and the first by name.

    Also says how far the raw files were read, so that another process can go on from there.
    """

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    read: int = 0
    last: str = ""  # id of the last raw sample that was read

    @classmethod
    def at(cls, state: Mapping[str, Any]) -> LeftOut:
        """As it was when it told this `state`."""
        return cls(**{**state, "counts": Counter(state["counts"])})

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        named = {reason: list(names) for reason, names in self.named.items()}
        counts = dict(self.counts)
        return {"counts": counts, "named": named, "read": self.read, "last": self.last}

    def add(self, dropped: Dropped) -> None:
        """One more."""
        self.counts[dropped.reason] += 1
        names = self.named.setdefault(dropped.reason, [])
        if len(names) < _NAMED_AT_MOST:
            names.append(f"{dropped.id} ({dropped.detail})" if dropped.detail else dropped.id)

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count} of {self.read}: {reason} {', '.join(self.named[reason])}"
            + ", …" * (count > len(self.named[reason]))
            for reason, count in self.counts.most_common()
        ]

    def refuse_more_than(self, share: float) -> None:
        """An error that lists them all, where they are more than allowed."""
        if self.counts.total() > share * self.read:
            raise DataError(
                f"{self.counts.total()} of {self.read} raw samples cannot be built:",
                "; ".join(self.lines()) + ". Correct them, or allow a share: --drop 5%.",
            )


def num_expected(recipe: Recipe) -> int:
    """Samples of the split before any draw, no picture opened: exact where none is left out."""
    with unread():
        return sum(isinstance(found, Sample) for found in _raw(recipe, LeftOut()))


def samples(
    recipe: Recipe, left_out: LeftOut, threads: int, expected: int | None
) -> Iterator[tuple[Sample, dict[str, Any] | None]]:
    """The samples behind those that `left_out` has read.

    With the last of each shard comes the state in which the next shard may be begun.
    """
    marked = _marked(_drawn(recipe, left_out, threads, expected), left_out, recipe)
    side = recipe.resize
    if side is None:
        yield from marked
        return

    def smaller(one: tuple[Sample, Any]) -> tuple[Sample, Any]:
        return resized(one[0], side), one[1]

    yield from in_order(smaller, marked, threads)


def _marked(
    found: Iterator[Sample], left_out: LeftOut, recipe: Recipe
) -> Iterator[tuple[Sample, dict[str, Any] | None]]:
    for number, sample in enumerate(found, start=1):
        ends_shard = number % recipe.samples_per_shard == 0
        yield sample, left_out.state() if ends_shard else None


def _drawn(
    recipe: Recipe, left_out: LeftOut, threads: int, expected: int | None
) -> Iterator[Sample]:
    """All samples; with `limit`, a keyed draw in the order of the split."""
    num_before = left_out.read - left_out.counts.total()
    usable = _usable(recipe, left_out, threads)
    if recipe.limit is None:
        yield from usable
        return
    # Counting first costs a second reading, but never holds more than some samples.
    if expected is None or recipe.droppable:
        expected = sum(1 for _ in _usable(recipe, LeftOut(), threads))
    keep = np.zeros(expected, dtype=bool)
    keep[epoch_order(expected, recipe.seed, epoch=0)[: recipe.limit]] = True
    for index, sample in enumerate(usable, start=num_before):
        if keep[index]:
            yield sample


def _usable(recipe: Recipe, left_out: LeftOut, threads: int) -> Iterator[Sample]:
    """What is no sample is counted; where some may be left out, so is what training refuses."""
    found = _raw(recipe, left_out)
    if recipe.droppable:
        found = in_order(partial(_looked_at, _task(recipe), set()), found, threads)
    for one in found:
        left_out.read += 1
        left_out.last = one.id
        if isinstance(one, Sample):
            yield one
        else:
            left_out.add(one)


def _looked_at(task: Task, intact: set[bytes], found: Sample | Dropped) -> Sample | Dropped:
    """Looked at before it is written: otherwise all of a folder is looked at behind the last."""
    try:
        if isinstance(found, Sample):
            look_at(found, task, intact)
    except DataError as fault:
        _, _, why = fault.fault.partition(": ")  # without the sample's own name
        return Dropped(found.id, "training would refuse it.", why or fault.fault)
    return found


def _raw(recipe: Recipe, left_out: LeftOut) -> Iterator[Sample | Dropped]:
    """All that the task reads behind what was read before."""
    try:
        raw = iter(_task(recipe).read(recipe.raw, recipe.split, recipe.options))
        last = ""
        # An unusable picture may stand for several samples; without --drop there is none.
        with nullcontext() if recipe.droppable else unread():
            for found in islice(raw, left_out.read):
                last = found.id
        if last != left_out.last:
            raise DataError(
                f"the raw files of task '{recipe.task}' now read otherwise than when a build"
                f" was killed: sample {left_out.read} is {last!r}, not {left_out.last!r};",
                "give the same command again: it starts anew.",
            )
        yield from raw
    except OSError as fault:
        raise DataError(
            f"cannot read '{fault.filename}' of task '{recipe.task}': {fault.strerror};",
            "check the folder given with --raw.",
        ) from fault


def _task(recipe: Recipe) -> Task:
    task: Task = plugins.load("task", recipe.task)
    return task
