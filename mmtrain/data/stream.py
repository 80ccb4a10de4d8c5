"""Whole optimizer steps in their planned order, prepared ahead.

A position counts optimizer steps, so a cursor is one number, and a resume on another world size
sees the same samples in the same order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from mmtrain.data.ahead import Ahead
from mmtrain.data.mixture import FILLERS_TRIED
from mmtrain.data.plan import PADDING, Planner
from mmtrain.errors import DataError
from mmtrain.models.interface import Batch, Example

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step on this rank."""

    position: int
    micro_batches: list[Batch]
    num_samples: int  # over all ranks, padding left out
    num_bad: int = 0  # of these, those that this rank left out


@dataclass(frozen=True)
class StepStream:
    """Steps from a position on, prepared ahead by threads (Pillow releases the GIL)."""

    planner: Planner
    example: Callable[[int], Example]
    collate: Callable[[Sequence[Example]], Batch]
    workers: int
    skips_bad: bool = False
    ahead: Ahead | None = None  # of remote shards

    def step(self, position: int) -> StepBatches:
        """One optimizer step, made here and now."""
        plan = self.planner.plan(position)
        bad: list[int] = []
        batches = [
            self.collate([self._weighted(index, bad) for index in share])
            for share in plan.of_rank(self.planner.layout.rank)
        ]
        return StepBatches(position, batches, plan.num_samples, len(bad))

    def _weighted(self, index: int, bad: list[int]) -> Example:
        if index == PADDING:
            return self._filler()
        if not self.skips_bad:
            return self.example(index)
        try:
            return self.example(index)
        except DataError as fault:
            log.warning("left out of training: %s", fault)
            bad.append(index)
            return self._filler()

    def _filler(self) -> Example:
        """A sample that counts for nothing: the first that is good."""
        last = min(self.planner.num_distinct, FILLERS_TRIED if self.skips_bad else 1)
        for index in range(last):
            try:
                return replace(self.example(index), weight=0.0)
            except DataError:
                if index == last - 1:
                    raise
        raise AssertionError("there are samples")

    def steps(self, start: int, stop: int) -> Iterator[StepBatches]:
        """Steps start..stop-1 in order."""
        try:
            for batches in self._prepared(start, stop):
                # Whoever asks for this step has taken the one before, for which ranks met.
                self._reach(batches.position, stop)
                yield batches
        finally:
            if self.ahead is not None:
                self.ahead.stop()

    def _reach(self, position: int, stop: int) -> None:
        if self.ahead is not None:
            self.ahead.reach(position, stop)

    def _prepared(self, start: int, stop: int) -> Iterator[StepBatches]:
        self._reach(start, stop)
        if self.workers == 0:
            yield from (self.step(position) for position in range(start, stop))
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        pending: deque[Future[StepBatches]] = deque()
        try:
            for position in range(start, stop):
                pending.append(pool.submit(self.step, position))
                if len(pending) > self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # Who ends a run does not wait for a shard that is still on its way.
            pool.shutdown(wait=False, cancel_futures=True)


def equal_chunks(num_samples: int, rank: int, world_size: int, size: int) -> list[list[int]]:
    """Fixed-size chunks of this rank's samples, as many on every rank; PADDING fills them up."""
    per_round = world_size * size
    padded = -(-num_samples // per_round) * per_round
    return [
        [i if i < num_samples else PADDING for i in range(start, start + size)]
        for start in range(rank * size, padded, per_round)
    ]
