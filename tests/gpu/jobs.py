"""One rank that trains, evaluates, counts waits and runs out of memory; see `family_jobs`.

`python -m tests.gpu.jobs JOBS.json`: on a card where torch sees one, else on the CPU.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mmtrain import distributed
from mmtrain.errors import MmtrainError
from mmtrain.resolve import resolve
from mmtrain.training import loop
from mmtrain.training.run import run_training
from mmtrain.training.step import train_step
from tests.distributed import family_jobs
from tests.distributed import jobs as run_jobs

COUNTED_STEP = 3
NO_MEMORY = 1e-5  # of the card's memory


def count_waits(job: dict[str, Any]) -> None:
    """Places in one optimizer step at which the host waits for the card."""
    found: list[str] = []
    steps = 0

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != COUNTED_STEP:
            return train_step(*arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return train_step(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found.extend(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught)

    with patch.object(loop, "train_step", counted):
        run_training(resolve(job["count_waits"]))
    Path(job["out"]).write_text(json.dumps(found))


def run_out_of_memory(job: dict[str, Any]) -> None:
    """Train with next to no memory; the message that the user gets."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(NO_MEMORY)
    try:
        run_training(resolve(job["out_of_memory"]))
    except MmtrainError as error:
        Path(job["out"]).write_text(json.dumps(str(error)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main(jobs_file: Path) -> None:
    """Every job in order; a job that fails leaves its error beside the jobs."""
    failures = []
    for job in json.loads(jobs_file.read_text()):
        began_s = time.monotonic()
        try:
            if "count_waits" in job:
                count_waits(job)
            elif "out_of_memory" in job:
                run_out_of_memory(job)
            elif "evaluate" in job:
                family_jobs.evaluate_run(job)
            else:
                run_jobs.train(job)
        except Exception as error:  # the other jobs are still worth having
            failures.append(f"{job['name']}: {type(error).__name__}: {error}")
        print(f"{time.monotonic() - began_s:6.1f} s  {job['name']}", flush=True)
    jobs_file.with_suffix(".failures").write_text("\n".join(failures))
    print("\n".join(failures))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
