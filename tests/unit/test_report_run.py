"""The report of one run, from files only, and the two commands."""

import argparse
import json
from pathlib import Path

import pytest

from mmtrain.commands import compare as compare_command
from mmtrain.commands import report as report_command
from mmtrain.config.schema import TrackingConfig
from mmtrain.errors import MmtrainError
from mmtrain.report.summary import results, summarize
from mmtrain.tracking.journal import RunJournal
from mmtrain.tracking.tracker import Status, Tracker


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
    (folder / "evaluation" / "val").mkdir(parents=True)
    (folder / "evaluation" / "val" / "metrics.json").write_text('{"accuracy": 0.75}')
    return folder


def test_summary_finds_best_step_last_values_and_evaluations(run_dir: Path) -> None:
    found = results(summarize(run_dir))
    assert found["best val/loss"] == "0.5 at step 30"
    assert found["last val/accuracy"] == "0.4" and found["last train/loss"] == "0.025"
    assert found["median train/samples_per_s"] == "70.5"
    assert found["val: accuracy"] == "0.75" and found["state"] == "finished"


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
            journal.append(step, 0.0, {"val/accuracy": value, "train/loss": 1 / step})
        tracker = Tracker.start(folder / name, settings, name, params, {})
        assert tracker.finish(status, 60)
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
