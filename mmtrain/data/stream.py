"""Whole optimizer steps in a keyed order, cut over ranks and micro-batches.

The order of samples is a function of (seed, epoch) alone. A position counts optimizer steps, so
a cursor is one number, and a resume on another world size sees the same samples in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmtrain.data.order import epoch_order
from mmtrain.errors import ConfigError
from mmtrain.models.interface import Batch, Example

# Sorting a million hashes takes 0.1 s: once per epoch, not at every step.
_order_of_epoch = lru_cache(maxsize=2)(epoch_order)
PADDING = -1  # an index in a step's plan that no sample fills


@dataclass(frozen=True)
class Layout:
    """How one global batch is cut."""

    world_size: int
    rank: int
    micro_batch: int
    global_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def check(self) -> Layout:
        """This layout, or an error when the global batch does not divide."""
        per_micro_step = self.world_size * self.micro_batch
        if self.global_batch % per_micro_step:
            smaller = max(1, self.global_batch // self.world_size)
            raise ConfigError(
                [
                    f"optim.global_batch: {self.global_batch} is no multiple of micro_batch"
                    f" {self.micro_batch} x {self.world_size} ranks; try micro_batch {smaller}"
                    f" or global_batch {-(-self.global_batch // per_micro_step) * per_micro_step}"
                ]
            )
        return self

    def micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """This rank's share of one global batch, micro-step by micro-step."""
        share = []
        for micro_step in range(self.accumulation):
            start = (micro_step * self.world_size + self.rank) * self.micro_batch
            share.append([int(i) for i in indices[start : start + self.micro_batch]])
        return share


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step on this rank."""

    position: int
    micro_batches: list[Batch]
    num_samples: int  # over all ranks, padding left out


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Optimizer steps in one pass; the last one may be padded."""
    return -(-num_samples // global_batch)


def plan_step(
    position: int, num_samples: int, global_batch: int, seed: int
) -> tuple[int, np.ndarray]:
    """(epoch, sample indices) of an optimizer step; the last step of an epoch is padded."""
    per_epoch = steps_per_epoch(num_samples, global_batch)
    epoch, step = divmod(position, per_epoch)
    order = _order_of_epoch(num_samples, seed, epoch)
    indices = order[step * global_batch : (step + 1) * global_batch]
    padding = np.full(global_batch - len(indices), PADDING, dtype=np.int64)
    return epoch, np.concatenate([indices.astype(np.int64), padding])


class StepStream:
    """Steps from a position on, prepared ahead by threads (Pillow releases the GIL)."""

    def __init__(
        self,
        num_samples: int,
        example: Callable[[int], Example],
        collate: Callable[[Sequence[Example]], Batch],
        layout: Layout,
        seed: int,
        workers: int,
    ) -> None:
        self.num_samples = num_samples
        self.layout = layout.check()
        self.steps_per_epoch = steps_per_epoch(num_samples, layout.global_batch)
        self._example = example
        self._collate = collate
        self._seed = seed
        self._workers = workers

    def step(self, position: int) -> StepBatches:
        """One optimizer step, made here and now."""
        _, indices = plan_step(position, self.num_samples, self.layout.global_batch, self._seed)
        batches = [
            self._collate([self._weighted(index) for index in share])
            for share in self.layout.micro_batches(indices.tolist())
        ]
        return StepBatches(position, batches, int((indices != PADDING).sum()))

    def _weighted(self, index: int) -> Example:
        if index == PADDING:
            return replace(self._example(0), weight=0.0)
        return self._example(index)

    def steps(self, start: int, stop: int) -> Iterator[StepBatches]:
        """Steps start..stop-1 in order."""
        if self._workers == 0:
            yield from (self.step(position) for position in range(start, stop))
            return
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            pending: deque[Future[StepBatches]] = deque()
            upcoming = iter(range(start, stop))
            try:
                for position in upcoming:
                    pending.append(pool.submit(self.step, position))
                    if len(pending) > self._workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


def equal_chunks(num_samples: int, rank: int, world_size: int, size: int) -> list[list[int]]:
    """Fixed-size chunks of this rank's samples, as many on every rank; PADDING fills them up."""
    per_round = world_size * size
    rounds = -(-num_samples // per_round)
    chunks = []
    for number in range(rounds):
        start = number * per_round + rank * size
        chunks.append([i if i < num_samples else PADDING for i in range(start, start + size)])
    return chunks
