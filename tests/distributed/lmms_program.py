"""lmms-eval's own evaluator and registry over our task files, without its thousand others.

`python -m tests.distributed.lmms_program OUT.json MODEL_ARGS TASK…` on every rank: rank 0 writes
each task's answers and accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmtrain.lmms import TASK_FILES

LIMIT, BATCH = 7, 3


def scored(
    model_args: str, *tasks: Any, include_path: Path = TASK_FILES, **given: Any
) -> dict[str, Any]:
    """What lmms-eval finds."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    given = {"batch_size": BATCH, "limit": LIMIT, "task_manager": manager, **given}
    found: dict[str, Any] = simple_evaluate(
        "mmtrain", model_args=model_args, tasks=list(tasks), **given
    )
    return found


def answers_of(found: dict[str, Any], task: str) -> list[str]:
    """The answers in the order of the documents."""
    logged = sorted(found["samples"][task], key=lambda one: one["doc_id"])
    return [one["filtered_resps"][0] for one in logged]


def main() -> None:
    """Score, and let rank 0 write it down."""
    out, model_args, *tasks = sys.argv[1:]
    found = scored(model_args, *tasks, distributed_executor_backend="torchrun")
    if found is not None:
        accuracy = {task: found["results"][task]["accuracy,none"] for task in tasks}
        kept = {task: [answers_of(found, task), accuracy[task]] for task in tasks}
        Path(out).write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
