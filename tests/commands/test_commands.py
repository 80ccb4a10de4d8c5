"""The commands as a user meets them: launch, evaluate, predict, export, report, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Path:
    """A run of two ranks, tracked in sqlite, with validation."""
    root = tmp_path_factory.mktemp("launched")
    data = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        root / "first",
        data={"val": str(digit_shards / "val"), "val_limit": 8},
        validate={"metric": "accuracy", "every": 3},
        generation={"max_new_tokens": 3, "batch_size": 4},
        tracking={"uri": f"sqlite:///{root}/mlflow.db", "experiment": "commands"},
    )
    tiny.run_cli("launch", str(tiny.write_run(root, data)), "--ranks", "2")
    return root / "first"


def test_a_launched_run_leaves_everything_behind(launched: Path) -> None:
    assert json.loads((launched / "status.json").read_text())["state"] == "finished"
    assert len(tiny.read_metrics(launched, "train/loss")) == 6
    assert len(tiny.read_metrics(launched, "val/accuracy")) == 2
    for name in ("run.yaml", "plot.png", "adapter/README.md", "full/connector.safetensors"):
        assert (launched / name).stat().st_size > 0, name
    lines = (launched / "evaluation" / "val" / "predictions.jsonl").read_text().splitlines()
    fields = {"id", "prompt", "prediction", "target", "score"}
    assert len(lines) == 8 and set(json.loads(lines[0])) == fields


def test_mlflow_has_the_run(launched: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{launched.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("commands")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["components.llm.r"] == "4" and run.data.tags["digest.data.train"]
    # What was counted before loading is what trains.
    tensors = [*(launched / "adapter").glob("*.safetensors"), *(launched / "full").glob("*.s*")]
    trained = sum(tensor.numel() for path in tensors for tensor in load_file(path).values())
    assert run.data.tags["counted.trained_params"] == str(trained)
    assert int(run.data.tags["counted.train_flops_per_sample"]) > 2 * trained
    assert "parameters train" in (launched / "logs" / "rank-0.log").read_text()
    declared = json.loads(run.data.tags["mmtrain.metric.val/accuracy"])
    assert declared == {"larger_is_better": True, "unit": "%"}
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 6
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"adapter", "full", "evaluation", "run.yaml"} <= names


def test_evaluate_scores_a_run_and_its_base(launched: Path, digit_shards: Path) -> None:
    test = str(digit_shards / "test")
    shown = tiny.run_cli("evaluate", str(launched), "--data", test, "--limit", "6").stdout
    assert "accuracy" in shown and "6 predictions" in shown
    tiny.run_cli("evaluate", str(launched), "--data", test, "--limit", "6", "--base")
    trained = json.loads((launched / "evaluation" / "test" / "metrics.json").read_text())
    base = json.loads((launched / "evaluation" / "test-base" / "metrics.json").read_text())
    assert trained["loss"] < base["loss"]


def test_predict_answers_one_question(launched: Path, tmp_path: Path) -> None:
    from PIL import Image

    image = tmp_path / "digit.png"
    Image.new("L", (32, 32), 90).save(image)
    answer = tiny.run_cli("predict", str(launched), "--image", str(image), "Which digit is it?")
    assert len(answer.stdout.splitlines()) >= 1
    missing = tiny.run_cli("predict", str(launched), "--image", "nowhere.png", "?", check=False)
    assert missing.returncode != 0 and "nowhere.png" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_report_and_compare_read_it_back(launched: Path, tmp_path: Path) -> None:
    assert "val/accuracy" in tiny.run_cli("report", str(launched)).stdout
    uri = f"sqlite:///{launched.parent}/mlflow.db"
    table = tmp_path / "table.csv"
    arguments = ("compare", "commands", "--uri", uri, "--by", "components.llm.r")
    shown = tiny.run_cli(*arguments, "--metric", "val/accuracy", "--csv", str(table)).stdout
    assert "val/accuracy (higher is better)" in shown and " %" in shown
    # What the loop measures has a direction, too; a learning rate has none.
    shown = tiny.run_cli(*arguments, "--metric", "memory/peak_gib").stdout
    assert "memory/peak_gib (lower is better)" in shown and "in GiB" in shown
    refused = tiny.run_cli(*arguments, "--metric", "train/lr", check=False)
    assert refused.returncode == 2 and "Give --mode max" in refused.stderr
    assert "components.llm.r" in table.read_text() or "r" in table.read_text().splitlines()[0]


def test_overfit_learns_samples_by_heart(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    data = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        tmp_path / "learn",
        components={name: {"mode": "full"} for name in ("vision", "connector", "llm")},
        optim={"lr": 2e-3},
        generation={"max_new_tokens": 3, "batch_size": 8},
    )
    data["components"]["llm"] = {"mode": "full"}
    tiny.run_cli("train", str(tiny.write_run(tmp_path, data)), "--overfit", "8")
    status = json.loads((tmp_path / "learn-overfit" / "status.json").read_text())
    assert status["metrics"]["val/accuracy"] == 1.0, status


def test_max_steps_is_a_quick_look_in_its_own_folder(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    data = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        tmp_path / "long",
        data={"val": str(digit_shards / "val")},
        generation={"max_new_tokens": 1, "batch_size": 8},
    )
    look = ("train", str(tiny.write_run(tmp_path, data)), "--max-steps")
    shown = tiny.run_cli(*look, "2").stdout
    folder = tmp_path / "long-quick"
    assert len(tiny.read_metrics(folder, "train/loss")) == 2
    predictions = folder / "evaluation" / "val" / "predictions.jsonl"
    assert len(predictions.read_text().splitlines()) == 16
    assert f"plot: {folder / 'plot.png'}" in shown and (folder / "plot.png").exists()
    # Another look, as another number of ranks that all start at once.
    tiny.wait_ranks(tiny.start_ranks(["mmtrain", *look, "1"], 2))
    assert len(tiny.read_metrics(folder, "train/loss")) == 1
    assert not (tmp_path / "long").exists()
