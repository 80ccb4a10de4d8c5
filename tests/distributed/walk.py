"""One rank that trains a list of runs, one after another: imports are paid once.

`python -m tests.distributed.walk JOBS.json`; a job may say to stop in mid-run, after the
validation of some step, the way an interrupted run would, and which CPU to pretend to have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmtrain.build import resolve
from mmtrain.training.run import run_training


class Interrupted(Exception):
    """Stands for whatever ends a run between two checkpoints."""


def pretend_fp16_kernels(present: bool) -> None:
    """DeepSpeed chooses by what the CPU can do: let it see another CPU from here on."""
    from deepspeed.accelerator import get_accelerator

    setattr(get_accelerator(), "is_fp16_supported", lambda: present)


def train(job: dict[str, Any]) -> None:
    """Train one job, as far as it says."""
    stop_step = job.get("stop_at_validation")
    if "fp16_kernels" in job:
        pretend_fp16_kernels(job["fp16_kernels"])

    def on_validation(step: int, metrics: dict[str, float]) -> None:
        if step == stop_step:
            raise Interrupted

    try:
        run_training(resolve(job["run"]), on_validation)
    except Interrupted:
        pass


def main(jobs_file: Path) -> None:
    """Train every job in order."""
    for job in json.loads(jobs_file.read_text()):
        train(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
