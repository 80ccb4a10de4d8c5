"""Which samples an optimizer step sees, and in which bins over ranks and micro-steps.

The samples of a step are a function of (seed, epoch) alone. How they are cut changes nothing but
rounding: the loss is divided by the answer tokens of all, and dropout is keyed by sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmtrain.data.mixture import Mixture
from mmtrain.data.order import epoch_order
from mmtrain.errors import ConfigError

# Sorting a million hashes takes 0.1 s: once per epoch, not at every step.
_order_of_epoch = lru_cache(maxsize=2)(epoch_order)
PADDING = -1  # an index in a step's plan that no sample fills
Bin = tuple[int, ...]  # samples of one forward on one rank
Rounds = tuple[tuple[Bin, ...], ...]  # [micro-step][rank]
Lengths = Mapping[int, int]  # tokens of samples


@dataclass(frozen=True)
class Layout:
    """How one global batch is cut."""

    world_size: int
    rank: int
    micro_batch: int
    global_batch: int
    micro_tokens: int | None = None  # padded tokens of one forward, in the place of `micro_batch`

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step; 1 where every step has as many as its samples need."""
        if self.micro_tokens is not None:
            return 1
        return self.global_batch // (self.world_size * self.micro_batch)

    def check(self) -> Layout:
        """This layout, or an error when the global batch does not divide."""
        per_micro_step = self.world_size * self.micro_batch
        if self.micro_tokens is None and self.global_batch % per_micro_step:
            smaller = max(1, self.global_batch // self.world_size)
            raise ConfigError(
                [
                    f"optim.global_batch: {self.global_batch} is no multiple of micro_batch"
                    f" {self.micro_batch} x {self.world_size} ranks; try micro_batch {smaller}"
                    f" or global_batch {-(-self.global_batch // per_micro_step) * per_micro_step}"
                ]
            )
        return self


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: bins [micro-step][rank] of sample numbers."""

    position: int
    epoch: int
    bins: Rounds

    @property
    def num_samples(self) -> int:
        """Over all ranks, padding left out."""
        return sum(index != PADDING for step in self.bins for one in step for index in one)

    def of_rank(self, rank: int) -> list[Bin]:
        """One bin per micro-step: the last one ends at the accumulation boundary."""
        return [step[rank] for step in self.bins]


@dataclass(frozen=True)
class Planner:
    """The plans of a run; with `lengths` (tokens of each sample) they are balanced."""

    num_samples: int
    layout: Layout
    seed: int
    lengths: np.ndarray | None = None
    mixture: Mixture | None = None  # whose epochs have `num_samples`; None: every sample once

    @property
    def num_distinct(self) -> int:
        """Samples that there are, however often an epoch has them."""
        return sum(self.mixture.sizes) if self.mixture else self.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the last one may be padded."""
        return -(-self.num_samples // self.layout.global_batch)

    def plan(self, position: int) -> StepPlan:
        """An optimizer step, by its number."""
        epoch, step = divmod(position, self.steps_per_epoch)
        size = self.layout.global_batch
        if self.mixture is None:
            order = _order_of_epoch(self.num_samples, self.seed, epoch)
        else:
            order = self.mixture.order(self.seed, epoch)
        chosen = order[step * size : (step + 1) * size].tolist()
        world = self.layout.world_size
        if self.lengths is None:
            return StepPlan(position, epoch, _in_rounds(_in_order(chosen, self.layout), world))
        known = dict(zip(chosen, self.lengths[chosen].tolist(), strict=True)) | {PADDING: 0}
        bins = _of_like_lengths(chosen, known, self.layout)
        return StepPlan(position, epoch, _dealt(_in_rounds(bins, world), known))


def _in_order(chosen: list[int], layout: Layout) -> list[Bin]:
    """Bins of one size, filled up with padding."""
    filled = chosen + [PADDING] * (layout.global_batch - len(chosen))
    size = layout.micro_batch
    return [tuple(filled[start : start + size]) for start in range(0, len(filled), size)]


def _of_like_lengths(chosen: Sequence[int], lengths: Lengths, layout: Layout) -> list[Bin]:
    """The longest first: who runs out of memory does so at once."""
    ordered = sorted(chosen, key=lambda index: -lengths[index])
    if layout.micro_tokens is None:
        return _in_order(ordered, layout)
    return _within(ordered, lengths, layout.micro_tokens, layout.world_size)


def _within(
    ordered: Sequence[int], lengths: Lengths, micro_tokens: int, world_size: int
) -> list[Bin]:
    """As many samples in a bin as fit when padded to its longest; bins for every rank alike."""
    bins: list[Bin] = []
    start = 0
    while start < len(ordered):
        count = max(1, micro_tokens // max(1, lengths[ordered[start]]))
        bins.append(tuple(ordered[start : start + count]))
        start += count
    while len(bins) % world_size:
        widest = max(range(len(bins)), key=lambda number: (len(bins[number]), -number))
        one = bins[widest]
        half = -(-len(one) // 2)
        bins[widest : widest + 1] = [one[:half], one[half:] or (PADDING,)]
    return bins


def _in_rounds(bins: Sequence[Bin], world_size: int) -> Rounds:
    """Consecutive bins make a micro-step: ranks that wait for each other get like lengths."""
    starts = range(0, len(bins), world_size)
    return tuple(tuple(bins[start : start + world_size]) for start in starts)


def _dealt(rounds: Rounds, lengths: Lengths) -> Rounds:
    """In every micro-step the rank with the fewest tokens so far gets the fullest bin."""
    totals = [0] * len(rounds[0])
    dealt = []
    for bins in rounds:
        tokens = [sum(lengths[index] for index in one) for one in bins]
        fullest_first = sorted(range(len(bins)), key=lambda number: -tokens[number])
        poorest_first = sorted(range(len(totals)), key=lambda rank: totals[rank])
        chosen = dict(zip(poorest_first, fullest_first, strict=True))
        dealt.append(tuple(bins[chosen[rank]] for rank in range(len(totals))))
        totals = [total + tokens[chosen[rank]] for rank, total in enumerate(totals)]
    return tuple(dealt)
