"""A trial that failed is explained in one line of ours, with what to do about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray_tune.journal import open_journal
from ray_tune.trials import expand
from tests.unit.test_study_journal import ACCURACY, a_study

# As Ray 2.60 says it, shortened in the middle.
RAYS_PARAGRAPH = """\
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, \
ID: 05dae6) was 22.41GB used / 23.59GB limit (0.950020)
OOM kill reason: Memory usage 24063379968B exceeded threshold of 24059061043B (95.0% of …)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/… \
Consider provisioning more memory on this node or reducing task parallelism …
"""


def test_a_failure_is_one_line_of_the_rank_that_caused_it() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import (
        UserExceptionWithTraceback,
        WorkerHealthCheckFailedError,
    )
    from ray.train.v2.api.exceptions import WorkerGroupError

    from ray_tune.failures import RankFailure, failure_in_words

    def failed(**ranks: Exception) -> str:
        failures = {int(rank[-1]): error for rank, error in ranks.items()}
        return failure_in_words(WorkerGroupError("", failures))

    echo = RankFailure("RuntimeError: [gloo/pair.cc:547] Connection closed by peer [127.0.0.1]")
    cause = RankFailure("step 3: the loss is NaN. Lower optim.lr.")
    assert failed(rank0=echo, rank1=cause) == f"rank 1: {cause}"
    assert failed(rank0=echo) == f"rank 0: {echo}"
    wrapped = UserExceptionWithTraceback(ValueError("first\n  last line\n"), "Traceback …")
    assert failed(rank3=wrapped) == "rank 3: ValueError: last line"
    died = RuntimeError("The actor is dead because its worker process has died. Worker exit …")
    assert failed(rank0=echo, rank1=died).startswith("rank 1: its process was killed or crashed")
    starved = OutOfMemoryError(RAYS_PARAGRAPH)
    expected = (
        "rank 1: out of memory on its machine (22.41GB used / 23.59GB limit); lower max_concurrent"
        " or ranks_per_trial in the study, or optim.micro_batch in its base"
    )
    assert failed(rank0=echo, rank1=starved) == expected
    polled = WorkerHealthCheckFailedError("A worker health check failed.", failure=starved)
    assert failed(rank0=echo, rank1=polled) == expected
    assert failure_in_words(ValueError("no\nranks here")) == "ranks here"


def test_a_driver_that_ran_out_of_memory_is_explained_in_our_words(tmp_path: Path) -> None:
    from ray_tune import events
    from ray_tune.progress import View

    study = a_study(tmp_path)
    journal = open_journal(study, expand(study), ACCURACY, resume=False)
    callback = events.StudyCallback(study, journal, View(journal), lambda: "")
    first, second = list(journal.records.values())[:2]
    for record, text in ((first, RAYS_PARAGRAPH), (second, "Traceback …\n\nKeyError: 'a'\n\n")):
        error_file = tmp_path / f"{record.name}.txt"
        error_file.write_text(f"Failure # 1 (occurred at 2026-01-01)\n{text}\n")
        trial = SimpleNamespace(config={"trial": record.name}, error_file=str(error_file))
        callback.on_trial_start(0, [], trial)
        callback.on_trial_error(0, [], trial)
    assert first.reason.startswith("its driver died: out of memory on its machine (22.41GB used")
    assert "docs.ray.io" not in first.reason and "\n" not in first.reason
    assert second.reason == "its driver died: KeyError: 'a'"


def test_what_ran_out_of_memory_is_tried_with_half_as_much_at_a_time() -> None:
    from mmtrain.resolve import resolve
    from ray_tune.failures import with_half_batches

    run: dict[str, Any] = {
        "model": {"family": "llava", "preset": "tiny"},
        "optim": {"global_batch": 12, "micro_batch": 6},
        "generation": {"batch_size": 5},
    }
    told = "rank 1: out of device memory with micro_batch 6"
    smaller = with_half_batches(run, told)
    assert smaller is not None
    config = resolve(smaller)
    assert (config.optim.micro_batch, config.optim.global_batch) == (3, 12)
    assert config.generation.batch_size == 2
    assert with_half_batches(run, "rank 1: step 3: the loss is NaN.") is None
    # 3 would be 1, which goes; 5 does not divide by 2.
    assert with_half_batches(smaller, told) is not None
    uneven = run | {"optim": {"global_batch": 15, "micro_batch": 5}}
    assert with_half_batches(uneven, told) is None
    least = run | {"optim": {"micro_batch": 1}, "generation": {"batch_size": 1}}
    assert with_half_batches(least, told) is None
    by_tokens = run | {
        "optim": {"micro_tokens": 100},
        "data": {"task": "digits", "cut": "balanced"},
    }
    smaller = with_half_batches(by_tokens, told)
    assert smaller is not None and smaller["optim"] == {"micro_tokens": 50}
