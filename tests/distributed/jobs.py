"""One rank that trains a list of runs, one after another: imports are paid once.

`python -m tests.distributed.jobs JOBS.json`; a job may say to stop in mid-run, after the
validation of some step, the way an interrupted run would, name a fault, or say which CPU to
pretend to have.
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
from mmtrain.models.dropout import scope_of
from mmtrain.resolve import resolve
from mmtrain.training import run as training_run
from mmtrain.training.run import run_training


class Interrupted(Exception):
    """Stands for whatever ends a run between two checkpoints."""


def pretend_fp16_kernels(present: bool) -> None:
    """DeepSpeed chooses by what the CPU can do: let it see another CPU from here on."""
    from deepspeed.accelerator import get_accelerator

    setattr(get_accelerator(), "is_fp16_supported", lambda: present)


def train(job: dict[str, Any]) -> None:
    """Train one job, as far as it says."""
    stop_step, fault = job.get("stop_at_validation"), job.get("fault")
    if "fp16_kernels" in job:
        pretend_fp16_kernels(job["fp16_kernels"])
    rank = int(os.environ.get("RANK", "0"))

    def on_validation(step: int, metrics: dict[str, float]) -> None:
        if step == stop_step and fault is None or fault == "rank 1 alone" and rank == 1:
            raise Interrupted("by hand")

    config = resolve(job["run"])
    try:
        with FAULTS.get(fault, nullcontext)():
            run_training(config, on_validation)
    except Interrupted:
        pass
    except Exception as error:
        if fault is None:
            raise
        (Path(config.run_dir) / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@contextmanager
def bad_gradient() -> Iterator[None]:
    """The connector's gradient is infinite in the second step on rank 1; its loss is not."""

    def build(*arguments: Any, **options: Any) -> Any:
        assembled = build_model(*arguments, **options)
        scope = scope_of(assembled.model)
        trained = assembled.trained_parameters()
        name = next(name for name in trained if "projector" in name)

        def harm(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf if scope.step == 1 else gradient

        if os.environ["RANK"] == "1":
            trained[name].register_hook(harm)
        return assembled

    with replaced("build_model", build):
        yield


@contextmanager
def bug_on_main() -> Iterator[None]:
    """What rank 0 does for all ends in an error that nobody foresaw."""

    def digests(*_: Any) -> Any:
        raise KeyError("a bug")

    with replaced("input_digests", digests):
        yield


@contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """Another function in the place of one that a run calls."""
    before = getattr(training_run, name)
    setattr(training_run, name, value)
    try:
        yield
    finally:
        setattr(training_run, name, before)


FAULTS: dict[str | None, Any] = {"gradient": bad_gradient, "main": bug_on_main}


def main(jobs_file: Path) -> None:
    """Train every job in order."""
    for job in json.loads(jobs_file.read_text()):
        train(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
