"""Whole optimizer steps in their planned order, prepared ahead.

A position counts optimizer steps, so a cursor is one number, and a resume on another world size
sees the same samples in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from mmtrain.data.plan import PADDING, Planner
from mmtrain.models.interface import Batch, Example


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step on this rank."""

    position: int
    micro_batches: list[Batch]
    num_samples: int  # over all ranks, padding left out


@dataclass(frozen=True)
class StepStream:
    """Steps from a position on, prepared ahead by threads (Pillow releases the GIL)."""

    planner: Planner
    example: Callable[[int], Example]
    collate: Callable[[Sequence[Example]], Batch]
    workers: int

    def step(self, position: int) -> StepBatches:
        """One optimizer step, made here and now."""
        plan = self.planner.plan(position)
        batches = [
            self.collate([self._weighted(index) for index in share])
            for share in plan.of_rank(self.planner.layout.rank)
        ]
        return StepBatches(position, batches, plan.num_samples)

    def _weighted(self, index: int) -> Example:
        if index == PADDING:
            return replace(self.example(0), weight=0.0)
        return self.example(index)

    def steps(self, start: int, stop: int) -> Iterator[StepBatches]:
        """Steps start..stop-1 in order."""
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
            pool.shutdown(cancel_futures=True)


def equal_chunks(num_samples: int, rank: int, world_size: int, size: int) -> list[list[int]]:
    """Fixed-size chunks of this rank's samples, as many on every rank; PADDING fills them up."""
    per_round = world_size * size
    padded = -(-num_samples // per_round) * per_round
    return [
        [i if i < num_samples else PADDING for i in range(start, start + size)]
        for start in range(rank * size, padded, per_round)
    ]
