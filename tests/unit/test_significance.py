"""Differences between settings: Student's tests where they are known, and their level."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from scipy import stats

from mmtrain.report.significance import (
    Setting,
    against_best,
    corrected_for_choice,
    explained,
    holm,
)

RANDOM = np.random.default_rng(7)


def of(values: Iterable[float], scores: Iterable[float] = ()) -> Setting:
    return Setting(tuple(map(float, values)), tuple(map(float, scores)))


def best_first(settings: list[Setting]) -> list[Setting]:
    return sorted(settings, key=lambda one: -one.mean)


def test_of_runs_alone_it_is_students_test_for_independent_samples() -> None:
    first, second = RANDOM.normal(0.9, 0.02, 5), RANDOM.normal(0.88, 0.02, 4)
    found = against_best(best_first([of(first), of(second)]))[1]
    known = stats.ttest_ind(first, second)
    assert found.chance == pytest.approx(known.pvalue)
    low, high = known.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_of_samples_alone_it_is_students_test_for_pairs() -> None:
    first, second = RANDOM.random(50), RANDOM.random(50)
    settings = best_first([of([first.mean()], first), of([second.mean()], second)])
    found = against_best(settings)[1]
    known = stats.ttest_rel(first, second)
    assert found.chance == pytest.approx(known.pvalue)
    low, high = sorted(map(abs, known.confidence_interval(0.95)))
    assert {round(abs(found.low), 9), round(abs(found.high), 9)} == {round(low, 9), round(high, 9)}


def test_of_several_settings_the_variance_is_pooled_and_pairs_are_corrected() -> None:
    runs = [RANDOM.normal(mean, 0.01, 3) for mean in (0.9, 0.9, 0.5)]
    settings = best_first([of(values) for values in runs])
    found = against_best(settings)
    variance = float(np.mean([np.var(values, ddof=1) for values in runs]))
    error = np.sqrt(variance * 2 / 3)
    plain = [
        2 * stats.t.sf((a.mean - b.mean) / error, 6)
        for a, b in (
            (settings[0], settings[1]),
            (settings[0], settings[2]),
            (settings[1], settings[2]),
        )
    ]
    corrected = holm(plain)
    assert [one.chance for one in found[1:]] == pytest.approx(corrected[:2])
    assert found[2].chance is not None and found[2].chance < 1e-6


def test_of_very_many_settings_only_those_beside_the_best_are_looked_at() -> None:
    settings = best_first([of(RANDOM.normal(0.9, 0.01, 2)) for _ in range(2000)])
    settings = [of([1.5, 1.5]), *settings]
    found = against_best(settings)
    chances = [one.chance for one in found[1:]]
    assert len(chances) == 2000 and all(chance is not None and chance < 0.01 for chance in chances)
    assert corrected_for_choice(settings) is not None


def test_holms_correction_is_that_of_his_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_what_is_not_known_is_not_said() -> None:
    found = against_best([of([0.9]), of([0.8])])[1]
    assert found.chance is None and found.more_seeds is None and found.gap == pytest.approx(0.1)
    alike = against_best([of([0.9, 0.9]), of([0.9, 0.9])])[1]
    assert alike.chance == 1.0
    assert against_best([of([0.5, 0.6])])[0].chance is None


def simulated(gap: float, seeds: int, samples: int) -> list[Setting]:
    """Two settings on the same samples: hard ones are hard for both, a seed shifts a run."""
    hardness = RANDOM.normal(0, 1, samples)
    settings = []
    for shift in (0.0, -gap):
        luck = RANDOM.normal(0, 0.1, (seeds, 1)) + RANDOM.normal(0, 0.5, (seeds, samples))
        runs = hardness + shift + luck
        settings.append(of(runs.mean(axis=1), runs.mean(axis=0)))
    return best_first(settings)


def found_apart(gap: float, seeds: int = 3, samples: int = 60) -> int:
    chances = [against_best(simulated(gap, seeds, samples))[1].chance for _ in range(200)]
    return sum(chance is not None and chance <= 0.05 for chance in chances)


def test_a_planted_difference_is_found_and_a_planted_likeness_is_not() -> None:
    # 10 of 200 are expected; 21 would be seen once in 1,000 times.
    assert found_apart(0.0) <= 21
    assert found_apart(0.6) >= 190


def test_many_settings_that_are_alike_have_no_false_winner() -> None:
    false = 0
    for _ in range(200):
        settings = best_first([of(RANDOM.normal(0.9, 0.02, 3)) for _ in range(8)])
        chances = [one.chance for one in against_best(settings)[1:]]
        false += any(chance is not None and chance <= 0.05 for chance in chances)
    assert false <= 21


def test_more_seeds_are_asked_for_where_they_would_settle_it() -> None:
    settings = [of([0.90, 0.92, 0.91]), of([0.89, 0.91, 0.90])]
    more = against_best(settings)[1].more_seeds
    assert more is not None and 1 <= more <= 20
    # Where the samples are too few, no number of seeds helps.
    few = [of([0.9, 0.92], [1, 1, 0, 1]), of([0.89, 0.9], [1, 0, 1, 1])]
    assert against_best(few)[1].more_seeds is None


def test_the_winner_owes_something_to_luck() -> None:
    truth, told, corrected = 0.9, [], []
    for _ in range(100):
        settings = [of(RANDOM.normal(truth, 0.02, 3)) for _ in range(10)]
        told.append(max(one.mean for one in settings))
        value = corrected_for_choice(settings)
        assert value is not None
        corrected.append(value)
    assert np.mean(told) > truth + 0.012
    assert abs(np.mean(corrected) - truth) < 0.5 * (np.mean(told) - truth)
    assert corrected_for_choice([of([0.9]), of([0.8])]) is None


def test_the_key_that_mattered_explains_the_variance() -> None:
    rows = [{"lr": lr, "r": r} for lr in ("1e-4", "1e-3") for r in ("4", "8")]
    found = explained(rows, [0.5, 0.52, 0.9, 0.92])
    assert found["lr"] > 0.99 and found["r"] < 0.01
    assert sum(found.values()) == pytest.approx(1.0)
    assert explained(rows, [1.0] * 4) == {}
