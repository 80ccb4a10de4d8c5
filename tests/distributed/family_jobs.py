"""One rank that trains and evaluates a list of runs of every family: imports are paid once.

`python -m tests.distributed.family_jobs JOBS.json`. A job either trains a run file's data, as in
`tests.distributed.jobs`, or evaluates a finished run in several passes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mmtrain import distributed, plugins
from mmtrain.assemble import build_source
from mmtrain.evaluation.evaluate import evaluate
from mmtrain.training.inference import Ready, ready_from_argument
from tests.distributed import jobs as run_jobs


def evaluate_run(job: dict[str, Any]) -> None:
    """Every pass over the run's best model; one JSON file per pass, from rank 0."""
    ready = ready_from_argument(job["evaluate"], job["overrides"], base=False)
    for name, asked in job["passes"].items():
        found = one_pass(ready, asked)
        if ready.engine.world.is_main:
            path = Path(job["evaluate"]) / f"{name}.json"
            path.write_text(json.dumps(found))


def one_pass(ready: Ready, asked: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, loss and answers on one folder, asked in chunks of one size."""
    data = ready.config.data
    assert data is not None and data.template is not None
    source = build_source(ready.config, ready.assembled, asked["folder"], data.val_limit)
    settings = ready.config.generation.model_copy(update={"batch_size": asked["batch_size"]})
    task = plugins.load("task", data.task)
    evaluation = evaluate(ready.engine, source, task, settings)
    answers = [prediction.prediction for prediction in evaluation.predictions]
    return {"answers": answers, **evaluation.metrics}


def main(jobs_file: Path) -> None:
    """Every job in order; how long each took stands beside the jobs."""
    for job in json.loads(jobs_file.read_text()):
        started_s = time.monotonic()
        if "evaluate" in job:
            evaluate_run(job)
            name = job["evaluate"]
        else:
            run_jobs.train(job)
            name = job["run"]["output_dir"]
        with open(jobs_file.with_suffix(".log"), "a", encoding="utf-8") as file:
            file.write(f"{time.monotonic() - started_s:6.1f} s  {name}\n")
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
