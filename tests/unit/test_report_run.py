"""The report of one run, from files only, and the two commands."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mmtrain.commands import compare as compare_command
from mmtrain.commands import report as report_command
from mmtrain.config.schema import TrackingConfig
from mmtrain.errors import MmtrainError
from mmtrain.report import plot
from mmtrain.report.summary import results, summarize
from mmtrain.tasks.interface import Metric, validation_metrics
from mmtrain.tracking.declared import DECLARED_NAME, as_fields, as_tags
from mmtrain.tracking.journal import JournalEntry, RunJournal
from mmtrain.tracking.tracker import Status, Tracker

SPEED = Metric("train/samples_per_s", larger_is_better=True, unit="samples/s")
ACCURACY = Metric("val/accuracy", larger_is_better=True, unit="%")
RATE = Metric("val/hallucination_rate", larger_is_better=False, unit="%")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "r64"
    journal = RunJournal(folder / "metrics.jsonl")
    for step in range(1, 41):
        metrics = {"train/loss": 1.0 / step, "train/samples_per_s": 50.0 + step}
        if step % 10 == 0:
            metrics |= {"val/loss": abs(step - 30) + 0.5, "val/accuracy": step / 100}
        journal.append(step, step / 20, metrics)
    (folder / "run.yaml").write_text(
        "name: <b>r64</b>\nvalidate: {metric: loss}\noptim: {lr: 0.1}\n"
        "tracking: {uri: 'http://me:hunter2@host'}\n"
    )
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    declared = (*validation_metrics({}).values(), ACCURACY, SPEED)
    (folder / DECLARED_NAME).write_text(json.dumps(as_fields(declared)))
    (folder / "evaluation" / "val").mkdir(parents=True)
    (folder / "evaluation" / "val" / "metrics.json").write_text('{"accuracy": 0.75}')
    return folder


def test_summary_finds_best_step_last_values_and_evaluations(run_dir: Path) -> None:
    found = results(summarize(run_dir))
    assert found["best val/loss"] == "0.5 at step 30"
    assert found["last val/accuracy"] == "40.0 %" and found["last train/loss"] == "0.025"
    assert found["median train/samples_per_s"] == "70.5 samples/s"
    assert found["val: accuracy"] == "75.0 %" and found["state"] == "finished"


def test_of_two_shares_the_declared_direction_decides_which_step_is_best(run_dir: Path) -> None:
    settings = run_dir / "run.yaml"
    settings.write_text(settings.read_text().replace("metric: loss", "metric: accuracy"))
    assert results(summarize(run_dir))["best val/accuracy"] == "40.0 % at step 40"
    upside_down = [replace(ACCURACY, larger_is_better=False)]
    (run_dir / DECLARED_NAME).write_text(json.dumps(as_fields(upside_down)))
    assert results(summarize(run_dir))["best val/accuracy"] == "10.0 % at step 10"


def test_curves_share_axes_by_unit_and_say_which_way_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figure = Figure()
    monkeypatch.setattr(plot, "_png", lambda draw, width, height: draw(figure) or b"")
    words = Metric("val/answer_words", larger_is_better=True, unit="words")
    declared = {each.name: each for each in (ACCURACY, RATE, words)}
    measured = {"val/accuracy": 0.25, RATE.name: 0.5, words.name: 7.0, "val/old": 3.0}
    entries = [JournalEntry(step, 0.0, 0.0, measured | {"val/loss": 2.0}) for step in (1, 2)]
    plot.run_png(entries, declared)
    shown = [{text.get_text() for text in axis.get_legend().get_texts()} for axis in figure.axes]
    assert shown == [
        {"val/loss"},
        {"val/accuracy ↑", "val/hallucination_rate ↓"},
        {"val/answer_words ↑"},
        {"val/old"},
    ]
    ticks = [axis.yaxis.get_major_formatter()(0.5) for axis in figure.axes]
    assert ticks[1] == "50 %" and ticks[0] != "50 %"
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "", "words", ""]


def test_a_run_of_an_older_version_has_no_best_rather_than_a_guessed_one(run_dir: Path) -> None:
    (run_dir / DECLARED_NAME).unlink()
    found = results(summarize(run_dir))
    assert found["best val/loss"] == "unknown: an older version stored no direction of it"
    assert found["last val/accuracy"] == "0.4"
    (run_dir / DECLARED_NAME).write_text('{"val/loss": {"larger_is_better": "no", "unit": ""}}')
    with pytest.raises(MmtrainError, match="declared_metrics.json cannot be read .*Delete it"):
        summarize(run_dir)


def test_report_command_prints_and_writes(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    report_command.configure(parser)
    assert report_command.run(parser.parse_args([str(run_dir)])) == 0
    output = capsys.readouterr().out
    assert "best val/loss" in output and "optim.lr" in output
    assert (run_dir / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (run_dir / "report.html").read_text()
    assert "&lt;b&gt;r64" in page and "<b>r64" not in page
    assert "hunter2" not in page + output


def test_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MmtrainError, match="is no run folder with results"):
        summarize(tmp_path)


@pytest.mark.parametrize("content", [b'{"state": "\xff"}', b"[" * 100_000, None])
@pytest.mark.parametrize("name", ["status.json", DECLARED_NAME])
def test_a_damaged_file_of_the_folder_is_one_error(
    run_dir: Path, name: str, content: bytes | None
) -> None:
    (run_dir / name).unlink()
    if content is None:
        (run_dir / name).mkdir()
    else:
        (run_dir / name).write_bytes(content)
    with pytest.raises(MmtrainError, match=f"{name} cannot be read"):
        summarize(run_dir)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Six finished runs of two ranks by three seeds, and one that failed."""
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder}/mlflow.db"
    settings = TrackingConfig(uri=uri, experiment="digits")
    trials: list[tuple[int, int, Status]] = [(16, 0, "FAILED")]
    trials += [(rank, seed, "FINISHED") for rank in (4, 8) for seed in (0, 1, 2)]
    for rank, seed, status in trials:
        name = f"r{rank}-s{seed}"
        journal = RunJournal(folder / name / "metrics.jsonl")
        params = {"components.llm.r": str(rank), "seed": str(seed)}
        for step, share in ((1, 0.5), (2, 1.0), (3, 0.9)):
            value = share * (0.8 + rank / 100 + seed / 1000)
            metrics = {ACCURACY.name: value, RATE.name: 1 - value, "train/loss": 1 / step}
            journal.append(step, 0.0, metrics)
        tags = as_tags([ACCURACY, RATE])
        tracker = Tracker.start(folder / name, settings, name, params, tags)
        tracker.end(status)
        assert tracker.wait_until_sent(60)
    return folder, uri


def _compare(store: tuple[Path, str], *more: str) -> int:
    parser = argparse.ArgumentParser()
    compare_command.configure(parser)
    return compare_command.run(parser.parse_args(["digits", "--uri", store[1], *more]))


def test_compare_prints_mean_and_deviation_over_seeds(
    store: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: store[0] / f"out.{kind}" for kind in ("csv", "markdown", "plot", "html")}
    flags = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    group = ["--by", "components.llm.r", "--metric", "val/accuracy"]
    assert _compare(store, *group, "--baseline", "0.1", *flags) == 0
    output = capsys.readouterr().out
    assert "88.1 ± 0.1 %" in output and "84.1 ± 0.1 %" in output
    assert "best run: r8-s2 with val/accuracy 88.2 %" in output
    assert "each run counts with its best val/accuracy" in output
    assert "not finished and left out: 1" in output
    assert all(path.stat().st_size > 100 for path in files.values())
    assert _compare(store, *group, "--value", "last") == 0
    assert "best run: r8-s2 with val/accuracy 79.4 %" in capsys.readouterr().out


def test_compare_reads_directions_that_runs_declared(
    store: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    group = ["--by", "components.llm.r", "--metric", RATE.name]
    assert _compare(store, *group) == 0
    output = capsys.readouterr().out
    assert "lower is better" in output and "11.9 ± 0.1 %" in output
    assert "best run: r8-s2 with val/hallucination_rate 11.8 %" in output
    assert _compare(store, *group, "--mode", "max") == 0
    output = capsys.readouterr().out
    assert "best run: r4-s0 with val/hallucination_rate 58.0 %" in output
    assert "--mode max, against what runs declare of val/hallucination_rate" in output


def test_a_direction_that_nobody_declared_has_to_be_given(
    store: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    group = ["--by", "components.llm.r", "--metric", "train/loss"]
    with pytest.raises(MmtrainError, match="no run says whether more or less train/loss"):
        _compare(store, *group)
    assert _compare(store, *group, "--mode", "min") == 0
    assert "train/loss 0.3333" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "components.llm.R", "--metric", "val/accuracy"], "'components.llm.r'"),
        (["--by", "seed", "--metric", "accuracy"], "'val/accuracy'"),
        (["--by", "seed", "--metric", "val/accuracy", "--study", "x"], "no study 'x'"),
    ],
)
def test_compare_names_what_is_nearest(
    store: tuple[Path, str], arguments: list[str], message: str
) -> None:
    with pytest.raises(MmtrainError, match=message):
        _compare(store, *arguments)


def test_compare_does_not_create_a_database(tmp_path: Path) -> None:
    with pytest.raises(MmtrainError, match="no tracking database"):
        _compare((tmp_path, f"sqlite:///{tmp_path}/none.db"), "--by", "seed", "--metric", "m")
    assert not list(tmp_path.iterdir())
