"""What a study remembers, what it does again, and what ASHA knows after a restart."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.errors import ConfigError, LaunchError, MmtrainError
from mmtrain.tasks.interface import Metric
from ray_tune import cluster
from ray_tune.cleaning import drop_checkpoints
from ray_tune.journal import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    Journal,
    Record,
    open_journal,
    study_lock,
)
from ray_tune.outcome import baseline_value, compare_trials, write_results
from ray_tune.progress import seconds_left, summary
from ray_tune.study import Study
from ray_tune.trials import expand
from tests.unit.test_study import BASE

ACCURACY = Metric("val/accuracy", larger_is_better=True, unit="%")


def a_study(folder: Path, **changes: Any) -> Study:
    data = {
        "name": "s",
        "base": BASE,
        "search": {"optim.lr": {"grid": [1e-3, 2e-3]}, "seed": {"grid": [1, 2]}},
        "output_dir": str(folder),
        "metric": "val/accuracy",
        "mode": "max",
        **changes,
    }
    return Study.model_validate(data)


def settle(journal: Journal, statuses: list[str], values: list[float]) -> None:
    for number, (record, status) in enumerate(zip(journal.records.values(), statuses)):
        record.status, record.attempts, record.seconds = status, 1, 10.0
        record.add(2, {"val/accuracy": values[number]}, 100.0 + number)
        journal.save(record)


def test_a_resumed_study_runs_only_what_is_not_settled(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    assert len(journal.unsettled()) == 4
    settle(journal, [FINISHED, STOPPED, FAILED, RUNNING], [0.5, 0.1, 0.2, 0.3])
    again = open_journal(study, expand(study), ACCURACY, resume=True)
    names = list(again.records)
    assert [record.status for record in again.records.values()] == [
        FINISHED,
        STOPPED,
        FAILED,
        WAITING,
    ]
    assert [record.name for record in again.unsettled()] == names[2:]
    assert again.records[names[0]] == journal.records[names[0]]


def test_a_used_folder_is_not_used_again_by_accident(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    settle(open_journal(study, expand(study), ACCURACY, resume=False), [FINISHED], [0.5])
    with pytest.raises(MmtrainError, match="holds 4 trials. Go on with it by --resume"):
        open_journal(study, expand(study), ACCURACY, resume=False)


def test_another_study_cannot_go_on_in_the_folder(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    settle(open_journal(study, expand(study), ACCURACY, resume=True), [FINISHED], [0.5])
    other = a_study(tmp_path, metric="val/loss", ranks_per_trial=2)
    with pytest.raises(ConfigError) as caught:
        open_journal(other, expand(other), ACCURACY, resume=True)
    expected = 'metric: the folder\'s study says "val/accuracy", this one "val/loss"'
    assert expected in str(caught.value)
    assert "ranks_per_trial" in str(caught.value)
    freely = a_study(tmp_path, max_concurrent=3, by=["seed"], keep_checkpoints="all", mode=None)
    open_journal(freely, expand(freely), ACCURACY, resume=True)


def test_a_study_that_never_started_may_change(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    open_journal(study, expand(study), ACCURACY, resume=False).remember_parent("abc")
    assert open_journal(study, expand(study), ACCURACY, resume=False).parent_run_id == "abc"
    other = a_study(tmp_path, metric="val/loss")
    assert open_journal(other, expand(other), ACCURACY, resume=False).parent_run_id is None


def test_a_half_written_result_costs_a_rerun_not_the_study(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    settle(journal, [FINISHED] * 4, [0.1] * 4)
    name = next(iter(journal.records))
    (tmp_path / "results" / f"{name}.json").write_text('{"name": "r')
    again = open_journal(study, expand(study), ACCURACY, resume=True)
    assert [record.name for record in again.unsettled()] == [name]


def test_a_damaged_study_file_is_an_error(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(MmtrainError, match="not readable"):
        open_journal(study, expand(study), ACCURACY, resume=True)
    (tmp_path / "study.json").write_text('{"format_version": 99}')
    with pytest.raises(MmtrainError, match="format version 99"):
        open_journal(study, expand(study), ACCURACY, resume=True)


def test_the_parent_run_survives_a_restart(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    open_journal(study, expand(study), ACCURACY, resume=False).remember_parent("abc")
    assert open_journal(study, expand(study), ACCURACY, resume=True).parent_run_id == "abc"


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with study_lock(tmp_path / "s"):
        with pytest.raises(MmtrainError, match="another `mmtrain tune` is running"):
            with study_lock(tmp_path / "s"):
                pass
    with study_lock(tmp_path / "s"):
        pass


def test_repeated_validations_are_counted_once() -> None:
    record = Record("a", "a", {})
    assert [record.add(step, {"m": step}, step) for step in (2, 4, 6)] == [1, 2, 3]
    assert record.add(4, {"m": 5.0}, 99.0) == 2
    assert [(r.step, r.metrics["m"], r.time_s) for r in record.reports] == [
        (2, 2, 2),
        (4, 5.0, 4),
        (6, 6, 6),
    ]


def test_the_best_is_by_mode_never_nan_and_the_earliest_on_a_tie() -> None:
    record = Record("a", "a", {})
    for step, value in enumerate([0.5, float("nan"), 0.9, 0.9, 0.1], start=1):
        record.add(step, {"m": value}, 0.0)
    record.add(9, {"other": 1.0}, 0.0)
    assert record.best(Metric("m", larger_is_better=True)) == (0.9, 3)
    assert record.best(Metric("m", larger_is_better=False)) == (0.1, 5)
    assert record.best(ACCURACY) is None


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


def test_a_trial_without_room_says_what_it_wants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_tune import events
    from ray_tune.progress import View

    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    now = [1000.0]
    monkeypatch.setattr(events.time, "time", lambda: now[0])
    callback = events.StudyCallback(
        study, journal, View(journal), lambda: "it wants 2 CPU; free are 0 CPU of 2 CPU"
    )
    trial = SimpleNamespace(config={"trial": next(iter(journal.records))})
    callback.on_trial_start(0, [], trial)
    now[0] += 59
    callback.on_step_end(0, [])
    assert "pending" not in capsys.readouterr().out
    now[0] += 2
    callback.on_step_end(0, [])
    callback.on_step_end(0, [])
    said = capsys.readouterr().out
    assert said.count("has been pending for 61 s: it wants 2 CPU; free are 0 CPU of 2 CPU") == 1
    callback.on_trial_result(0, [], trial, {"started": 1})
    now[0] += 600
    callback.on_step_end(0, [])
    assert "pending" not in capsys.readouterr().out


def test_a_trial_without_the_metric_has_failed(tmp_path: Path) -> None:
    from ray_tune import events
    from ray_tune.progress import View

    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    callback = events.StudyCallback(study, journal, View(journal), lambda: "")
    first, second = list(journal.records.values())[:2]
    second.add(2, {"val/loss": 1.0, "val/accurracy": 0.5}, 0.0)
    for record in (first, second):
        trial = SimpleNamespace(config={"trial": record.name})
        callback.on_trial_start(0, [], trial)
        result = {"outcome": 1, "failure": "", "training_seconds": 1.0}
        callback.on_trial_result(0, [], trial, result)
        callback.on_trial_complete(0, [], trial)
    assert first.status == second.status == FAILED
    assert "never validated" in first.reason
    assert "did you mean 'val/accurracy'?" in second.reason


def test_validations_that_nobody_heard_are_read_from_the_run(tmp_path: Path) -> None:
    from ray_tune import events
    from ray_tune.progress import View

    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    record = next(iter(journal.records.values()))
    run_dir = tmp_path / "trials" / record.name
    run_dir.mkdir(parents=True)
    lines = [
        {"step": step, "epoch": 0.1, "time_s": 5.0, "metrics": metrics}
        for step, metrics in [(1, {"train/loss": 1.0}), (2, {"val/accuracy": 0.25})]
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    callback = events.StudyCallback(study, journal, View(journal), lambda: "")
    trial = SimpleNamespace(config={"trial": record.name})
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, {"outcome": 1, "failure": "", "training_seconds": 0.0})
    assert record.status == FINISHED
    assert record.best(ACCURACY) == (0.25, 2)


@pytest.mark.parametrize(
    ("policy", "kept"), [("best", [2, 3]), ("all", [0, 1, 2, 3]), ("none", [3])]
)
def test_optimizer_checkpoints_of_settled_trials_are_dropped(
    tmp_path: Path, policy: str, kept: list[int]
) -> None:
    study = a_study(tmp_path, keep_checkpoints=policy)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    settle(journal, [FINISHED, STOPPED, FINISHED, FAILED], [0.5, 0.95, 0.9, 0.99])
    folders = [tmp_path / "trials" / name for name in journal.records]
    for folder in folders:
        (folder / "checkpoints" / "step-2").mkdir(parents=True)
        (folder / "adapter").mkdir()
    drop_checkpoints(study, journal)
    assert [n for n, folder in enumerate(folders) if (folder / "checkpoints").exists()] == kept
    assert all((folder / "adapter").exists() for folder in folders)


def test_results_and_comparison_hold_every_trial(tmp_path: Path) -> None:
    study = a_study(tmp_path, baseline=0.1)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    settle(journal, [FINISHED, FINISHED, STOPPED, FAILED], [0.5, 0.7, 0.2, 0.9])
    list(journal.records.values())[3].reason = "rank 1: it broke, badly"
    text = write_results(study, journal).read_text()
    assert len(text.splitlines()) == 5
    assert '"rank 1: it broke, badly"' in text
    comparison = compare_trials(study, journal)
    assert comparison.statistics.best_run.value == 0.7
    assert comparison.statistics.groups[0].mean == pytest.approx(0.6), "seeds fall together"
    assert comparison.statistics.gain == pytest.approx(0.6)
    lines = "\n".join(comparison.lines())
    assert "1 stopped early" in lines and "it broke" in lines
    assert all(path.exists() for path in comparison.paths.values())


def test_a_baseline_file_is_an_evaluations_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"accuracy": 0.25, "loss": 2.0}')
    assert baseline_value(a_study(tmp_path, baseline=str(path))) == 0.25
    path.write_text('{"acuracy": 0.25}')
    with pytest.raises(MmtrainError, match="has no val/accuracy"):
        baseline_value(a_study(tmp_path, baseline=str(path)))
    with pytest.raises(MmtrainError, match="cannot be read"):
        baseline_value(a_study(tmp_path, baseline=str(tmp_path / "no.json")))


def test_the_live_line_says_how_far_the_study_is(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    assert summary(journal, 1) == "0/4 trials done, 0 running, 0 failed"
    first, second, third, _ = journal.records.values()
    first.status, first.seconds = FINISHED, 60.0
    first.add(2, {"val/accuracy": 0.75}, 0.0)
    second.status, third.status = RUNNING, RUNNING
    line = summary(journal, 2)
    expected = "1/4 trials done, 2 running, 0 failed; about 2 min left; best val/accuracy 75.0 %"
    assert line == f"{expected} ({first.name})"
    assert seconds_left(journal, 2) == 120.0


def test_resources_that_cannot_suffice_are_an_error(tmp_path: Path) -> None:
    study = a_study(tmp_path, ranks_per_trial=3)
    with pytest.raises(LaunchError, match="one trial wants 3 CPU, Ray has 2 CPU"):
        cluster.trials_at_a_time(study, {"CPU": 2})
    assert cluster.trials_at_a_time(study, {"CPU": 7}) == 2
    assert cluster.rank_resources(study, {"CPU": 7, "GPU": 4}) == {"CPU": 1.0, "GPU": 1.0}
    limited = a_study(tmp_path, max_concurrent=1)
    assert cluster.trials_at_a_time(limited, {"CPU": 8}) == 1
    assert cluster.driver_resources({"CPU": 2, "trial_slot": 4}) == {"CPU": 0, "trial_slot": 1}


def test_the_token_of_the_private_ray_is_its_users_own(tmp_path: Path) -> None:
    token = tmp_path / "token"
    environment = cluster.private_environment(token)
    assert stat.S_IMODE(os.stat(token).st_mode) == 0o600
    assert environment["RAY_AUTH_MODE"] == "token"
    assert token.read_text() not in "".join(environment.values())


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("ray://127.0.0.1:10001", "not an address of the form HOST:PORT"),
        ("127.0.0.1", "not an address of the form HOST:PORT"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("127.0.0.1:1", "no Ray cluster answers"),
    ],
)
def test_an_address_where_nobody_listens_is_refused_at_once(address: str, fault: str) -> None:
    with pytest.raises(LaunchError, match=fault):
        cluster.check_address(address)


def test_a_study_of_an_older_version_goes_on(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    trials = expand(study)
    journal = open_journal(study, trials, ACCURACY, resume=False)
    journal.save(next(iter(journal.records.values())))
    path = journal.folder / "study.json"
    stored = json.loads(path.read_text())
    for key in ("axes", "columns", "notes"):
        del stored["study"][key]
    for entry in stored["study"]["search"].values():
        del entry["when"]
    path.write_text(json.dumps(stored))
    assert len(open_journal(study, trials, ACCURACY, resume=True).records) == len(trials)
