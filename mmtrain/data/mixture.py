"""Several data sets in one epoch, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmtrain.config.schema import MixPart
from mmtrain.data.order import epoch_order, keyed_hash
from mmtrain.data.source import Source
from mmtrain.data.windows import Windows
from mmtrain.errors import DataError
from mmtrain.models.interface import Example

FILLERS_TRIED = 100  # samples, to find a good one in the place of bad ones


@dataclass(frozen=True)
class Mixture:
    """How many samples each set has, and how many passes over it one epoch makes.

    Samples are numbered through, set after set.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    windows: Windows | None = None  # where the data exceed the cache

    @property
    def num_samples(self) -> int:
        """Of one epoch."""
        return sum(self._counts())

    def _counts(self) -> list[int]:
        pairs = zip(self.sizes, self.weights, strict=True)
        return [max(1, round(weight * size)) for size, weight in pairs]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The numbers of an epoch's samples, in its order."""
        return _order(self, seed, epoch)

    def windows_in_order(self, seed: int, epoch: int) -> np.ndarray:
        """The window of every place of that order, never falling."""
        return _windows_in_order(self, seed, epoch)

    def slots(self, seed: int, epoch: int) -> np.ndarray:
        """The same before they are shuffled.

        Whole passes hold every sample. What is left of a weight goes on, epoch by epoch, through
        keyed orders of the set, so that none of its samples comes twice before all have come.
        """
        found, start = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self._counts(), strict=True)):
            passes, rest = divmod(count, size)
            chosen = [np.arange(size)] * passes
            if rest:
                chosen.append(_stretch(size, (seed, number), epoch * rest, rest))
            found.append(start + np.concatenate(chosen))
            start += size
        return np.concatenate(found)


def mixture_of(
    parts: Mapping[str, MixPart], sizes: Sequence[int], windows: Windows | None = None
) -> Mixture:
    """As the run file weighs its data sets."""
    return Mixture(tuple(sizes), tuple(part.weight for part in parts.values()), windows)


def _stretch(size: int, key: tuple[int, int], start: int, count: int) -> np.ndarray:
    """Part of an endless row of keyed orders, one behind the other."""
    first, last = start // size, (start + count - 1) // size
    # Another key than the epoch's own: a seed beyond all that a run file may hold.
    seed = (key[0] << 32) + (1 << 31) + key[1]
    row = np.concatenate([epoch_order(size, seed, number) for number in range(first, last + 1)])
    return row[start - first * size :][:count]


# Sorting a million hashes takes 0.1 s: once per epoch, not at every step.
@lru_cache(maxsize=2)
def _order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    slots = mixture.slots(seed, epoch)
    if mixture.windows is None:
        return slots[epoch_order(len(slots), seed, epoch)]
    hashes = keyed_hash(seed, epoch, np.arange(len(slots)))
    return slots[np.lexsort((hashes, mixture.windows.of(seed, epoch)[slots]))]


@lru_cache(maxsize=2)
def _windows_in_order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    if mixture.windows is None:
        return np.zeros(mixture.num_samples, dtype=np.int64)
    return mixture.windows.of(seed, epoch)[mixture.order(seed, epoch)]


@dataclass(frozen=True)
class Mixed:
    """The samples of several sources, numbered through."""

    parts: tuple[Source, ...]
    skips_bad: bool = False

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def example(self, index: int) -> Example:
        """A sample, tokenised, with its images."""
        part, own = self._place(index)
        return part.example(own)

    def num_tokens(self, index: int) -> int:
        """Length of a sample, no image decoded; of one that is left out, that of what fills in."""
        fillers = range(min(len(self), FILLERS_TRIED)) if self.skips_bad else ()
        fault: DataError | None = None
        for number in (index, *fillers):
            part, own = self._place(number)
            try:
                return part.num_tokens(own)
            except DataError as error:
                fault = fault or error
        assert fault is not None
        raise fault

    def _place(self, index: int) -> tuple[Source, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)
