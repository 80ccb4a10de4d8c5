"""One rank that trains a list of runs, one after another: imports are paid once.

`python -m tests.distributed.walk JOBS.json`; a job may say to stop in mid-run, after the
validation of some step, the way an interrupted run would, or to harm one gradient on one rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mmtrain.assemble import build_model
from mmtrain.build import resolve
from mmtrain.errors import TrainingError
from mmtrain.models.dropout import scope_of
from mmtrain.training import run as training_run
from mmtrain.training.run import run_training


class Interrupted(Exception):
    """Stands for whatever ends a run between two checkpoints."""


def train(job: dict[str, Any]) -> None:
    """Train one job, as far as it says."""
    stop_step, bad_gradient = job.get("stop_at_validation"), job.get("bad_gradient")

    def on_validation(step: int, metrics: dict[str, float]) -> None:
        if step == stop_step:
            raise Interrupted

    config = resolve(job["run"])
    try:
        with harmed(**bad_gradient) if bad_gradient else nullcontext():
            run_training(config, on_validation)
    except Interrupted:
        pass
    except TrainingError as error:
        if not bad_gradient:
            raise
        (Path(config.run_dir) / f"error-{os.environ['RANK']}.txt").write_text(str(error))


@contextmanager
def harmed(rank: int, position: int, part: str) -> Iterator[None]:
    """One parameter's gradient is infinite in one step on one rank; the loss stays as it was."""

    def build(*arguments: Any, **options: Any) -> Any:
        assembled = build_model(*arguments, **options)
        scope = scope_of(assembled.model)
        trained = assembled.trained_parameters()
        name = next(name for name in trained if part in name)

        def harm(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf if scope.step == position else gradient

        if int(os.environ["RANK"]) == rank:
            trained[name].register_hook(harm)
        return assembled

    setattr(training_run, "build_model", build)
    try:
        yield
    finally:
        setattr(training_run, "build_model", build_model)


def main(jobs_file: Path) -> None:
    """Train every job in order."""
    for job in json.loads(jobs_file.read_text()):
        train(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
