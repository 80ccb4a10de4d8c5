"""Which validation is best, and when patience runs out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mmtrain.config.schema import ValidateConfig
from mmtrain.errors import TrainingError
from mmtrain.training.early_stopping import EarlyStopping
from tests import in_process, tiny


def stopping(**settings: object) -> EarlyStopping:
    return EarlyStopping.of(ValidateConfig.model_validate(settings))


def test_a_loss_falls_and_an_accuracy_rises() -> None:
    loss, accuracy = stopping(metric="loss"), stopping(metric="accuracy")
    assert [loss.update({"val/loss": v}, i) for i, v in enumerate((2.0, 1.0, 1.5))] == [
        True,
        True,
        False,
    ]
    assert [accuracy.update({"val/accuracy": v}, i) for i, v in enumerate((0.2, 0.4, 0.3))] == [
        True,
        True,
        False,
    ]
    assert (loss.best_step, loss.best_value, accuracy.best_step) == (1, 1.0, 1)


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


def test_an_unknown_metric_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(TrainingError, match="did you mean 'accuracy'"):
        stopping(metric="acuracy").update({"val/loss": 1.0, "val/accuracy": 0.5}, 1)


def test_a_run_stops_when_patience_runs_out_and_keeps_best_and_last(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    run = tiny.run_data(
        tiny_checkpoint,
        digit_shards,
        tmp_path / "patient",
        data={"val": str(digit_shards / "val"), "val_limit": 4},
        # A rate that destroys what was learnt: validation gets worse at once.
        components={"connector": {"mode": "freeze"}, "llm": {"mode": "full"}},
        optim={"lr": 0.1, "max_steps": 12, "schedule": "constant", "max_grad_norm": 0},
        validate={"every": 1, "metric": "loss", "patience": 2},
        checkpoint={"keep": 1},
        generation={"max_new_tokens": 2, "batch_size": 4},
    )
    with in_process.one_rank():
        in_process.train(run)
    losses = tiny.read_metrics(tmp_path / "patient", "val/loss")
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 12
    kept = {path.name for path in (tmp_path / "patient" / "checkpoints").iterdir()}
    assert kept == {f"step-{best}", f"step-{best + 2}"}
