"""Schedulers: what they know after a restart is what they knew before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_tune.journal import STOPPED, open_journal
from ray_tune.study import Study
from ray_tune.trials import expand
from tests.unit.test_study_journal import ACCURACY, a_study


def asha_study(folder: Path) -> Study:
    settings = {"type": "asha", "grace": 1, "reduction_factor": 2, "max": 8}
    return a_study(folder, scheduler=settings)


@pytest.mark.parametrize(("value", "goes_on"), [(0.5, False), (0.95, True)])
def test_ashas_rungs_after_a_restart_are_what_they_were(
    tmp_path: Path, value: float, goes_on: bool
) -> None:
    from ray_tune.scheduler import Rungs

    study = asha_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    *past, last = journal.records.values()
    live = Rungs(study.scheduler, ACCURACY)
    verdicts = []
    for time_s, (record, seen) in enumerate(zip(past, [0.8, 0.4, 0.9])):
        number = record.add(2, {"val/accuracy": seen}, float(time_s))
        verdicts.append(live.goes_on(record.name, number, {"val/accuracy": seen}))
        journal.save(record)
    assert verdicts == [True, False, True], "half of the trials pass each rung"
    restarted = Rungs(study.scheduler, ACCURACY)
    restarted.replay(open_journal(study, expand(study), ACCURACY, resume=True).records)
    assert live.goes_on(last.name, 1, {"val/accuracy": value}) == goes_on
    assert restarted.goes_on(last.name, 1, {"val/accuracy": value}) == goes_on
    assert Rungs(study.scheduler, ACCURACY).goes_on(
        last.name, 1, {"val/accuracy": value}
    ), "without memory: always"


def test_the_scheduler_writes_down_before_it_stops_and_ignores_repeats(tmp_path: Path) -> None:
    from ray_tune.scheduler import StudyScheduler

    study = asha_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    names = list(journal.records)
    scheduler = StudyScheduler(study, journal)

    def report(name: str, step: int, value: float) -> str:
        trial = SimpleNamespace(config={"trial": name})
        return scheduler.on_trial_result(None, trial, {"step": step, "val/accuracy": value})

    assert report(names[0], 2, 0.8) == "CONTINUE"
    assert report(names[1], 2, 0.1) == "STOP"
    again = open_journal(study, expand(study), ACCURACY, resume=True)
    assert again.records[names[1]].status == STOPPED
    resumed = StudyScheduler(study, again)
    trial = SimpleNamespace(config={"trial": names[0]})
    repeated = {"step": 2, "val/accuracy": 0.0}
    assert resumed.on_trial_result(None, trial, repeated) == "CONTINUE", "already judged"
    assert resumed.on_trial_result(None, trial, {"started": 1}) == "CONTINUE"


def test_the_median_rule_after_a_restart_judges_as_before(tmp_path: Path) -> None:
    from ray_tune.scheduler import Rungs

    study = a_study(tmp_path, scheduler={"type": "median", "grace": 2, "least_trials": 2})
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    *past, last = journal.records.values()
    live = Rungs(study.scheduler, ACCURACY)
    for time_s, (record, seen) in enumerate(zip(past, [0.8, 0.4, 0.7])):
        for step in (1, 2):
            number = record.add(step, {"val/accuracy": seen}, time_s + step / 10)
            assert live.goes_on(record.name, number, {"val/accuracy": seen})
        journal.save(record)
    restarted = Rungs(study.scheduler, ACCURACY)
    restarted.replay(open_journal(study, expand(study), ACCURACY, resume=True).records)
    for rungs in (live, restarted):
        assert rungs.goes_on(last.name, 1, {"val/accuracy": 0.1}), "within the grace"
        assert not rungs.goes_on(last.name, 2, {"val/accuracy": 0.5}), "the median is 0.7"
    fresh = Rungs(study.scheduler, ACCURACY)
    assert fresh.goes_on(last.name, 2, {"val/accuracy": 0.5}), "too few were seen"


def test_no_scheduler_lets_every_trial_go_on(tmp_path: Path) -> None:
    from ray_tune.scheduler import Rungs

    rungs = Rungs(a_study(tmp_path).scheduler, ACCURACY)
    assert all(rungs.goes_on("t", number, {"val/accuracy": 0.0}) for number in range(1, 200))
