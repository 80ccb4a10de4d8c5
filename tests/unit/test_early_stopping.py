"""Which validation is best, and when patience runs out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.schema import ValidateConfig
from mmtrain.errors import TrainingError
from mmtrain.report.summary import results, summarize
from mmtrain.tasks.metrics import ACCURACY
from mmtrain.tracking.declared import read_declared
from mmtrain.training.early_stopping import EarlyStopping
from tests import in_process, tiny
from tests.unit.judged import LENGTH, RATE, SENTIMENT, judge_digits


class Judged:
    """As much of a task as declares metrics."""

    metrics = (ACCURACY, RATE, SENTIMENT, LENGTH)


def stopping(**settings: object) -> EarlyStopping:
    task: Any = Judged()
    return EarlyStopping.of(ValidateConfig.model_validate(settings), {"": task})


@pytest.mark.parametrize(
    ("metric", "values", "best_step"),
    [
        ("loss", (2.0, 1.0, 1.5), 1),
        ("accuracy", (0.2, 0.4, 0.3), 1),
        ("hallucination_rate", (0.5, 0.1, 0.9), 1),
        ("sentiment_accuracy", (0.5, 0.9, 0.1), 1),
        ("glossary_loss_words", (5.0, 9.0, 1.0), 1),
    ],
)
def test_what_is_best_is_as_the_task_declares_it(
    metric: str, values: tuple[float, ...], best_step: int
) -> None:
    found = stopping(metric=metric)
    verdicts = [found.update({f"val/{metric}": value}, i) for i, value in enumerate(values)]
    assert verdicts == [True, True, False]
    assert (found.best_step, found.best_value) == (best_step, values[best_step])


def test_patience_counts_validations_without_gain_and_waits_for_min_epochs() -> None:
    patient = stopping(metric="loss", patience=2, min_epochs=5)
    for step, value in enumerate((1.0, 1.1, 1.2)):
        patient.update({"val/loss": value}, step)
    assert not patient.should_stop(epochs_done=4.9) and patient.should_stop(epochs_done=5.0)
    assert not stopping(metric="loss").should_stop(epochs_done=100.0)


def test_nan_is_never_best_and_is_replaced() -> None:
    found = stopping(metric="loss")
    found.update({"val/loss": math.nan}, 0)
    assert found.update({"val/loss": 3.0}, 1) and found.best_step == 1
    assert not found.update({"val/loss": math.nan}, 2)


def test_state_survives_a_checkpoint() -> None:
    before, after = stopping(metric="loss", patience=3), stopping(metric="loss", patience=3)
    before.update({"val/loss": 1.0}, 4)
    before.update({"val/loss": 2.0}, 5)
    after.restore(before.state())
    assert after == before


def test_a_metric_that_validation_does_not_give_is_an_error_with_the_nearest_name() -> None:
    fault = "validate.metric: validation gives no 'accuracy'; did you mean 'accuracy_image'"
    with pytest.raises(TrainingError, match=re.escape(fault)):
        stopping(metric="accuracy").update({"val/loss": 1.0, "val/accuracy_image": 0.5}, 1)


def test_a_run_stops_when_patience_runs_out_and_keeps_best_and_last(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "patient"
    rates = [0.5, 0.25, 0.75, 1.0]
    judge_digits(monkeypatch, rates)
    run = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        run_dir,
        data={"val": str(digit_shards / "val"), "val_limit": 4},
        components={"connector": {"mode": "freeze"}, "llm": {"mode": "full"}},
        optim={"max_steps": 12},
        validate={"every": 1, "metric": RATE.name, "patience": 2},
        checkpoint={"keep": 1},
        generation={"max_new_tokens": 2, "batch_size": 4},
    )
    with in_process.one_rank():
        best = in_process.train(run)
    assert tiny.read_metrics(run_dir, "val/hallucination_rate") == rates
    assert best["val/hallucination_rate"] == 0.25
    kept = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert kept == {"step-2", "step-4"}
    assert json.loads((run_dir / "status.json").read_text())["best_step"] == 2
    judged = json.loads((run_dir / "evaluation" / "val" / "metrics.json").read_text())
    assert judged["hallucination_rate"] == 0.25, "the answers are those of the exported step"
    shown = results(summarize(run_dir))
    assert shown["best val/hallucination_rate"] == "25.0 % at step 2"
    assert shown["last val/glossary_loss_words"] == "0 words"
    assert {"val/loss", "train/loss", "memory/peak_gib"} < read_declared(run_dir).keys()
