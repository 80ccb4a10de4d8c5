"""Whether settings differ: seeds and samples are both drawn, and many pairs are looked at.

A mean over runs varies for two reasons: another seed trains another model (variance between runs of
a setting, pooled over all settings), and other samples would be asked (variance of the per-sample
differences, which seeds share). With one of the two alone this is Student's t-test: of independent
runs, or of paired samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

LEVEL = 0.05
_MOST_SEEDS = 100
_DRAWS, _MOST_DRAWN = 4000, 4_000_000
_MOST_PAIRED = 100  # settings, all pairs of which are looked at


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone. Values are oriented: more is better.

    `scores`: of each sample that all settings were asked, the mean over the runs.
    """

    values: tuple[float, ...]
    scores: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Over the runs."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True)
class Behind:
    """How far a setting is behind the best.

    `chance`: of a difference as large between settings that are alike, corrected for all pairs
    (Holm; of very many settings Bonferroni); None where nothing is known of how values vary.
    `more_seeds`: how many runs more of each would settle it, were the difference as it looks; None:
    no number would.
    """

    gap: float
    low: float
    high: float
    chance: float | None
    more_seeds: int | None = None


@dataclass(frozen=True)
class _Spread:
    """Of the difference of two settings: variance for each run of one, and through samples."""

    per_run: float
    run_freedom: int
    samples: float
    sample_freedom: int

    def variance(self, n: int, m: int) -> float:
        return self.per_run * (1 / n + 1 / m) + self.samples

    def freedom(self, n: int, m: int) -> float:
        """Satterthwaite's: of a sum of two estimates."""
        runs = self.per_run * (1 / n + 1 / m)
        parts = ((runs, self.run_freedom), (self.samples, self.sample_freedom))
        return (runs + self.samples) ** 2 / sum(v**2 / f for v, f in parts if v > 0 and f > 0)


def against_best(settings: Sequence[Setting]) -> list[Behind]:
    """Each setting beside the first, which has the best mean."""
    if len(settings) < 2:
        return [Behind(0.0, 0.0, 0.0, None)] * len(settings)
    pooled, freedom = pooled_variance(settings)
    num_pairs = math.comb(len(settings), 2)
    beside_best = [(0, number) for number in range(1, len(settings))]
    few = len(settings) <= _MOST_PAIRED
    pairs = list(combinations(range(len(settings)), 2)) if few else beside_best
    spreads = {pair: _spread(settings, pair, pooled, freedom) for pair in pairs}
    chances = {pair: _chance(settings, pair, spreads[pair]) for pair in pairs}
    known = {pair: chance for pair, chance in chances.items() if chance is not None}
    corrected = [min(1.0, chance * num_pairs) for chance in known.values()]
    if few:
        corrected = holm(list(known.values()))
    found = dict(zip(known, corrected, strict=True))
    others = [
        _behind(settings, pair, spreads[pair], found.get(pair), num_pairs) for pair in beside_best
    ]
    return [Behind(0.0, 0.0, 0.0, None), *others]


def pooled_variance(settings: Sequence[Setting]) -> tuple[float, int]:
    """Between runs of a setting, and its degrees of freedom."""
    freedom = sum(len(one.values) - 1 for one in settings)
    squares = math.fsum((value - one.mean) ** 2 for one in settings for value in one.values)
    return (squares / freedom, freedom) if freedom else (0.0, 0)


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's correction: how sure to be of each when all are looked at."""
    order = sorted(range(len(chances)), key=lambda number: chances[number])
    found, so_far = [0.0] * len(chances), 0.0
    for rank, number in enumerate(order):
        so_far = max(so_far, min(1.0, chances[number] * (len(chances) - rank)))
        found[number] = so_far
    return found


def corrected_for_choice(settings: Sequence[Setting]) -> float | None:
    """The best setting's mean, less what it owes to having been chosen as the best.

    Means are drawn around those seen, as far apart as they vary; how much the winner of a draw is
    above its own centre, on average, is what choosing adds.
    """
    pooled, freedom = pooled_variance(settings)
    if not freedom or pooled == 0 or len(settings) < 2:
        return None
    means = np.array([one.mean for one in settings])
    errors = np.sqrt([pooled / len(one.values) for one in settings])
    generator = np.random.default_rng(len(settings))
    draws = min(_DRAWS, _MOST_DRAWN // len(settings))
    drawn = means + errors * generator.standard_normal((draws, len(settings)))
    winners = drawn.argmax(axis=1)
    added = (drawn[np.arange(draws), winners] - means[winners]).mean()
    return float(means.max() - added)


def explained(rows: Sequence[Mapping[str, str]], values: Sequence[float]) -> dict[str, float]:
    """Of each key, which share of the variance of the values its own means explain."""
    numbers = np.asarray(values, dtype=np.float64)
    total = float(((numbers - numbers.mean()) ** 2).sum())
    found = {}
    for key in rows[0] if rows and total > 0 else ():
        groups: dict[str, list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            groups.setdefault(row[key], []).append(value)
        between = sum(len(g) * (np.mean(g) - numbers.mean()) ** 2 for g in groups.values())
        found[key] = float(between) / total
    return found


def _spread(
    settings: Sequence[Setting], pair: tuple[int, int], pooled: float, freedom: int
) -> _Spread:
    first, second = (settings[number] for number in pair)
    if not first.scores:
        return _Spread(pooled, freedom, 0.0, 0)
    apart = np.asarray(first.scores) - np.asarray(second.scores)
    count = len(apart)
    through_samples = float(apart.var(ddof=1)) / count if count > 1 else 0.0
    return _Spread(pooled, freedom, through_samples, count - 1)


def _chance(settings: Sequence[Setting], pair: tuple[int, int], spread: _Spread) -> float | None:
    first, second = (settings[number] for number in pair)
    n, m, gap = len(first.values), len(second.values), abs(first.mean - second.mean)
    variance = spread.variance(n, m)
    if variance > 0:
        return _two_sided(gap / math.sqrt(variance), spread.freedom(n, m))
    known = spread.run_freedom or spread.sample_freedom
    return (0.0 if gap > 0 else 1.0) if known else None


def _behind(
    settings: Sequence[Setting],
    pair: tuple[int, int],
    spread: _Spread,
    chance: float | None,
    num_pairs: int,
) -> Behind:
    from scipy.special import stdtrit

    first, second = (settings[number] for number in pair)
    n, m, gap = len(first.values), len(second.values), first.mean - second.mean
    variance = spread.variance(n, m)
    half = 0.0
    if variance > 0:
        half = float(-stdtrit(spread.freedom(n, m), LEVEL / 2)) * math.sqrt(variance)
    more = None
    if chance is not None and chance > LEVEL and spread.per_run > 0:
        more = _more_seeds(gap, n, m, spread, num_pairs)
    return Behind(gap, gap - half, gap + half, chance, more)


def _more_seeds(gap: float, n: int, m: int, spread: _Spread, num_pairs: int) -> int | None:
    """As if each run more told as much of the variance as those that there are."""
    for more in range(1, _MOST_SEEDS + 1):
        grown = _Spread(
            spread.per_run, spread.run_freedom + 2 * more, spread.samples, spread.sample_freedom
        )
        error = math.sqrt(grown.variance(n + more, m + more))
        freedom = grown.freedom(n + more, m + more)
        if _two_sided(gap / error, freedom) * num_pairs <= LEVEL:
            return more
    return None


def _two_sided(ratio: float, freedom: float) -> float:
    """How often Student's t is as far from zero as this."""
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(ratio)))
