"""What a study must not do: leak a password, oversubscribe cores, export another step's adapter."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.errors import ConfigError
from mmtrain.tasks.datasets.digits import Digits
from mmtrain.tasks.interface import Metric
from mmtrain.tracking.journal import JOURNAL_NAME, RunJournal
from ray_tune.cluster import private_folder
from ray_tune.journal import FINISHED, open_journal
from ray_tune.outcome import compare_trials, plot_trials, write_results
from ray_tune.study import Study, load_study
from ray_tune.trials import check_trials, expand
from tests.tiny import REPOSITORY
from tests.unit.judged import LENGTH, RATE, SENTIMENT, judge_digits
from tests.unit.test_study import BASE, study
from tests.unit.test_study_journal import ACCURACY, a_study, settle

CANARY = "canary-7f3a"


def with_password(folder: Path, password: str, host: str = "db", **changes: Any) -> Any:
    uri = f"postgresql://me:{password}@{host}/runs"
    base = {**BASE, "tracking": {"uri": uri}}
    return a_study(folder, base=base, tracking={"uri": f"{uri}2?password={password}"}, **changes)


def files_with(text: str, folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_trials_that_failed_before_their_first_step_do_not_stop_the_plots(tmp_path: Path) -> None:
    settings = a_study(tmp_path)
    journal = open_journal(settings, expand(settings), ACCURACY, resume=False)
    empty, half, measured, never = (tmp_path / "trials" / name for name in journal.records)
    for folder in (empty, half, measured):
        RunJournal(folder / JOURNAL_NAME).close()
    (half / JOURNAL_NAME).write_text('{"step": 1, "ep')
    written = RunJournal(measured / JOURNAL_NAME)
    written.append(1, 0.1, {"train/loss": 2.0})
    written.close()
    plot_trials(journal)
    assert (measured / "plot.png").stat().st_size > 0
    assert not any((folder / "plot.png").exists() for folder in (empty, half, never))


def test_no_file_of_a_study_holds_a_password(tmp_path: Path) -> None:
    from ray_tune import events
    from ray_tune.progress import View

    settings = with_password(tmp_path, CANARY)
    trials = expand(settings)
    assert CANARY in trials[0].run["tracking"]["uri"], "the run itself needs it"
    journal = open_journal(settings, trials, ACCURACY, resume=False)
    journal.remember_parent("abc")
    settle(journal, [FINISHED] * 3, [0.5, 0.6, 0.7])
    callback = events.StudyCallback(settings, journal, View(journal), lambda: "")
    failing = SimpleNamespace(config={"trial": list(journal.records)[3]})
    callback.on_trial_start(0, [], failing)
    failure = f"cannot reach postgresql://me:{CANARY}@db/runs"
    result = {"outcome": 1, "failure": failure, "training_seconds": 1.0}
    callback.on_trial_result(0, [], failing, result)
    callback.on_trial_complete(0, [], failing)
    write_results(settings, journal)
    compare_trials(settings, journal)
    assert files_with("cannot reach postgresql://***@db/runs", tmp_path), "the reason is told"
    assert files_with(CANARY, tmp_path) == []
    stored = json.loads((tmp_path / "study.json").read_text())["study"]
    assert stored["base"]["tracking"]["uri"] == "postgresql://***@db/runs"
    assert stored["tracking"]["uri"] == "postgresql://***@db/runs2?password=***"


def test_a_study_with_a_password_is_the_same_study_on_resume(tmp_path: Path) -> None:
    settings = with_password(tmp_path, CANARY)
    settle(open_journal(settings, expand(settings), ACCURACY, resume=False), [FINISHED], [0.5])
    for password in (CANARY, "a-new-one"):
        again = with_password(tmp_path, password)
        assert len(open_journal(again, expand(again), ACCURACY, resume=True).unsettled()) == 3
    elsewhere = with_password(tmp_path, CANARY, host="other")
    with pytest.raises(ConfigError) as caught:
        open_journal(elsewhere, expand(elsewhere), ACCURACY, resume=True)
    assert "tracking" in str(caught.value) and CANARY not in str(caught.value)


def test_a_folder_from_before_passwords_were_hidden_goes_on_without_them(tmp_path: Path) -> None:
    settings = with_password(tmp_path, CANARY)
    settle(open_journal(settings, expand(settings), ACCURACY, resume=False), [FINISHED], [0.5])
    path = tmp_path / "study.json"
    path.write_text(path.read_text().replace("***", f"me:{CANARY}"))
    open_journal(settings, expand(settings), ACCURACY, resume=True)
    assert files_with(CANARY, tmp_path) == []


def test_rays_own_files_are_their_users_alone(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir(mode=0o755)  # of a driver that was killed
    folder = private_folder(tmp_path / ".ray")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("key", ["tracking.uri", "name", "output_dir"])
def test_keys_that_change_no_result_are_not_searched(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' does not change what a run computes"):
        study(search={key: {"grid": ["a", "b"]}})


@pytest.mark.parametrize(
    ("parallel", "cpus", "threads"),
    [
        (None, 1.0, 1),
        ({}, 4.0, 4),
        ({"deepspeed": "zero2"}, 0.5, 1),
        ({"threads": None}, 2.9, 2),
        ({"threads": 3}, 1.0, 3),
    ],
)
def test_a_rank_has_as_many_threads_as_cpus(
    parallel: dict[str, Any] | None, cpus: float, threads: int
) -> None:
    from mmtrain.resolve import resolve
    from ray_tune.worker import with_threads

    run = BASE if parallel is None else {**BASE, "parallel": parallel}
    before = json.dumps(run)
    resolved = resolve(with_threads(run, cpus)).parallel
    assert resolved.threads == threads
    assert resolved.deepspeed == (parallel or {}).get("deepspeed", "zero1")
    assert json.dumps(run) == before


def test_trials_are_ranked_by_what_their_adapters_are_chosen_by() -> None:
    unlike = study(metric="val/accuracy", mode="max")
    with pytest.raises(ConfigError) as caught:
        check_trials(unlike, expand(unlike), "study.yaml")
    text = str(caught.value)
    assert text.count("set validate.metric: accuracy in the base run") == 1
    assert "best val/loss" in text
    alike = study(
        metric="val/accuracy", mode="max", base={**BASE, "validate": {"metric": "accuracy"}}
    )
    assert check_trials(alike, expand(alike), "study.yaml") == ACCURACY
    default = study()
    assert check_trials(default, expand(default), "study.yaml").mode == "min"


def test_a_searched_validate_metric_counts_as_well() -> None:
    search = {"validate.metric": {"grid": ["loss", "accuracy"]}}
    mixed = study(search=search)
    with pytest.raises(ConfigError, match=r"set validate.metric: loss .*\(trial metric_accuracy-"):
        check_trials(mixed, expand(mixed), "study.yaml")


def test_the_demos_study_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    path = REPOSITORY / "docs" / "examples" / "demo" / "study.yaml"
    loaded = load_study(path)
    check_trials(loaded, expand(loaded), str(path))


def test_the_worst_trial_is_never_ranked_first() -> None:
    upside_down = study(
        metric="val/accuracy", mode="min", base={**BASE, "validate": {"metric": "accuracy"}}
    )
    with pytest.raises(ConfigError, match="set mode: max"):
        check_trials(upside_down, expand(upside_down), "study.yaml")


def judged_study(metric: Metric, folder: Path, **changes: Any) -> Study:
    base = {**BASE, "validate": {"metric": metric.name}}
    return a_study(folder, base=base, metric=f"val/{metric.name}", mode=None, **changes)


@pytest.mark.parametrize(("metric", "best"), [(RATE, 1), (SENTIMENT, 2), (LENGTH, 2)])
def test_trials_are_ranked_as_their_task_declares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, best: int
) -> None:
    from ray_tune.scheduler import Rungs

    judge_digits(monkeypatch, [])
    asha = {"type": "asha", "grace": 1, "reduction_factor": 2, "max": 8}
    settings = judged_study(metric, tmp_path, scheduler=asha)
    trials = expand(settings)
    ranking = check_trials(settings, trials, "study.yaml")
    journal = open_journal(settings, trials, ranking, resume=False)
    rungs = Rungs(settings.scheduler, ranking)
    verdicts = []
    for record, value in zip(journal.records.values(), [0.5, 0.1, 0.9, 0.5]):
        record.status = FINISHED
        number = record.add(2, {ranking.name: value}, 1.0)
        verdicts.append(rungs.goes_on(record.name, number, {ranking.name: value}))
    names = list(journal.records)
    assert journal.best() is journal.records[names[best]]
    assert compare_trials(settings, journal).statistics.best_run.name == names[best]
    assert verdicts[best] and not verdicts[3 - best], "ASHA stops the worst"


def test_a_metric_that_no_validation_gives_is_known_before_any_trial(tmp_path: Path) -> None:
    for metric, meant in (("val/acuracy", "val/accuracy"), ("accuracy", "val/accuracy")):
        wrong = a_study(tmp_path, metric=metric)
        with pytest.raises(ConfigError) as caught:
            check_trials(wrong, expand(wrong), "study.yaml")
        fault = f"metric: validation of the trials gives no '{metric}'"
        assert f"{fault}; did you mean '{meant}'?" in str(caught.value)


def test_tasks_that_mean_something_else_by_a_metric_are_not_ranked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "metrics", (Metric("accuracy", larger_is_better=False),))
    base = {**BASE, "validate": {"metric": "accuracy"}}
    search = {"data.task": {"grid": ["digits", "scienceqa"]}}
    mixed = a_study(tmp_path, base=base, search=search, mode=None)
    with pytest.raises(ConfigError, match="val/accuracy does not mean the same in .*search one"):
        check_trials(mixed, expand(mixed), "study.yaml")
