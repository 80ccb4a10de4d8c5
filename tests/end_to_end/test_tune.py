"""A real study through real Ray: one trial fails, the driver is killed, the study goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtrain.tracking.client import connect
from tests import tiny

_TIMEOUT_S = 600  # a wait in vain, on a busy machine


@pytest.fixture
def study_file(tmp_path: Path, tiny_checkpoint: Path, digit_shards: Path) -> Path:
    """Three trials, of which the second has no data; 2 ranks each."""
    run = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        tmp_path,
        data={"val": str(digit_shards / "val"), "val_limit": 4, "limit": None},
        optim={"max_steps": 20},
        validate={"every": 2},
    )
    places = [digit_shards / "val", tmp_path / "missing", digit_shards / "train"]
    study = {
        "name": "resumed",
        "base": {key: run[key] for key in run if key not in ("name", "output_dir", "tracking")},
        "search": {
            "data.train": {"grid": [str(place) for place in places]},
        },
        "metric": "val/loss",
        "mode": "min",
        "ranks_per_trial": 2,
        "resources_per_rank": {"cpu": 0.5},
        "max_concurrent": 1,
        "output_dir": str(tmp_path / "study"),
        "baseline": 9.0,
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "tune"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def test_study_survives_a_failing_trial_and_a_killed_driver(
    study_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    first = _start(study_file)
    try:
        _wait(lambda: _mid_training(folder), first, "the third trial to be in training")
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    _wait(
        lambda: not _processes_of(tmp_path, but="Agent"), None, "the killed driver's ranks to end"
    )
    killed = _results(folder)
    assert [record["status"] for record in killed] == ["finished", "failed", "running"]

    refused = tiny.run_cli("tune", str(study_file), check=False)
    assert refused.returncode != 0
    assert "--resume" in refused.stderr

    second = _start(study_file, "--resume")
    output, _ = second.communicate(timeout=_TIMEOUT_S)
    assert second.returncode == 0, output
    # Two idle helpers of the killed Ray look for their dead head for some seconds.
    _wait(lambda: not _processes_of(tmp_path), None, "every process to be gone")

    records = _results(folder)
    assert [record["name"] for record in records] == [record["name"] for record in killed]
    assert [record["status"] for record in records] == ["finished", "failed", "finished"]
    assert [record["attempts"] for record in records] == [1, 2, 2]
    assert "missing" in records[1]["reason"] and "\n" not in records[1]["reason"]
    assert records[1]["reason"] in output
    _check_resumed_trial(folder / "trials" / records[2]["name"], records[2])
    _check_tracking(tmp_path, [record["name"] for record in records])
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert (folder / "comparison.html").exists()
    assert "gain over the unadapted base" in output


def _check_resumed_trial(run_dir: Path, record: dict[str, Any]) -> None:
    assert "resuming after step" in (run_dir / "logs" / "rank-0.log").read_text()
    steps = [report["step"] for report in record["reports"]]
    assert steps == list(range(2, 21, 2)), "every validation once, none lost"
    assert (run_dir / "adapter").is_dir()
    other = [folder for folder in run_dir.parent.iterdir() if folder != run_dir]
    with_checkpoints = [folder for folder in other if (folder / "checkpoints").is_dir()]
    assert len(with_checkpoints) + (run_dir / "checkpoints").is_dir() == 1, "only the best's stay"


def _check_tracking(tmp_path: Path, names: list[str]) -> None:
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tune")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["resumed"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/failed"] == 1
    for name in (names[0], names[2]):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[name].info.status == "FINISHED"
    assert len(runs) == 3, "the resumed study and its trials go on in the same runs"


def _start(study_file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmtrain", "tune", str(study_file), *arguments]
    return subprocess.Popen(
        command,
        cwd=tiny.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MMTRAIN_TEST_MARK": str(study_file.parent)},
    )


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str] | None, what: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline_s:
            said = process.stdout.read() if ended and process and process.stdout else ""
            raise AssertionError(f"waited in vain for {what}\n{said}")
        time.sleep(0.1)


def _mid_training(folder: Path) -> bool:
    records = _results(folder) if (folder / "results").is_dir() else []
    return len(records) == 3 and 1 <= len(records[2]["reports"]) < 7


def _results(folder: Path) -> list[dict[str, Any]]:
    """The trials' result files in the study's order, those that exist."""
    trials = json.loads((folder / "study.json").read_text())["trials"]
    paths = [folder / "results" / f"{trial['name']}.json" for trial in trials]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _processes_of(tmp_path: Path, but: str = "") -> list[int]:
    """Processes of ours that still run: they inherited the mark in the environment."""
    mark = f"MMTRAIN_TEST_MARK={tmp_path}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                excused = but and but.encode() in (entry / "cmdline").read_bytes()
                if not excused and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # gone meanwhile, or another user's
    return found


@pytest.mark.soak
def test_columns_run_one_after_another_into_one_table(
    tmp_path: Path, tiny_checkpoint: Path, digit_shards: Path
) -> None:
    run = tiny.run_data(tiny_checkpoint, digit_shards, tmp_path, optim={"max_steps": 2})
    run["data"] |= {"val": "val", "val_limit": 4, "train": "train"}
    run["components"]["llm"] = {"mode": "peft", "sublayers": ["attn"]}
    study = {
        "name": "table",
        "base": {key: run[key] for key in run if key not in ("name", "output_dir", "tracking")},
        "axes": {
            "method": {
                "LoRA": {"components.llm.method": "lora", "components.llm.r": 4},
                "IA3": {"components.llm.method": "ia3"},
            },
        },
        "columns": {"digits": {}, "known": {"run": {"data.val": "train"}}},
        "printed": {"LoRA": {"digits": 5.0}},
        "output_dir": str(tmp_path / "study"),
        "tracking": {"uri": "none"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    refused = tiny.run_cli("tune", str(path), "--data", str(tmp_path / "no"), check=False)
    assert refused.returncode != 0 and "--data says where" in refused.stderr
    tiny.run_cli("tune", str(path), "--data", str(digit_shards))
    again = tiny.run_cli("tune", str(path), "--data", str(digit_shards), "--resume")
    assert again.stdout.count("2 trials, 0 to run") == 2
    with (tmp_path / "study" / "table.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [(cell["method"], cell["column"]) for cell in cells] == [
        ("LoRA", "digits"),
        ("LoRA", "known"),
        ("IA3", "digits"),
        ("IA3", "known"),
    ]
    assert all(float(cell["mean"]) > 0 for cell in cells) and cells[0]["printed"] == "5.0"
