"""How sure a score is: resampled samples, and two runs on the same ones.

Draws are keyed by nothing but how many samples there are: the same scores give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
PERCENT = 95
_TAILS = ((100 - PERCENT) / 2, (100 + PERCENT) / 2)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """Where a mean of so many samples lies, 95 of 100 times."""

    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """By how much a run is better than another on the same samples.

    `chance` is how often signs drawn at random give a difference as large.
    """

    difference: float
    interval: Interval
    chance: float


def interval(scores: Sequence[float]) -> Interval:
    """Of the mean of these scores, by the bootstrap."""
    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(len(values))
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, _TAILS)
    return Interval(float(low), float(high))


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The second's gain over the first; the samples are the same, in the same order."""
    gains = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    # Where both are equal, a sign changes nothing.
    apart = gains[gains != 0]
    generator = np.random.default_rng(len(gains))
    sums = np.array(
        [np.where(generator.random(len(apart)) < 0.5, apart, -apart).sum() for _ in range(DRAWS)]
    )
    as_large = int((np.abs(sums) >= abs(apart.sum()) - _ROUNDING).sum())
    chance = (1 + as_large) / (1 + DRAWS)
    return Paired(float(gains.mean()), interval(gains.tolist()), chance)


def is_mean(value: float, scores: Sequence[float]) -> bool:
    """Whether a metric is the mean of the samples' scores: of others, no interval is known."""
    return bool(scores) and abs(value - sum(scores) / len(scores)) <= _ROUNDING
