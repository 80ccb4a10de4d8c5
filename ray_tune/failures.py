"""What ended a trial, as one line with the remedy: Ray's own words are paragraphs of its manual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmtrain.resolve import resolve

# What Ray's monitor, which kills before the kernel does, saw: `22.50GB used / 23.59GB limit`.
_MEMORY_SEEN = re.compile(r"running low on memory.*?([\d.]+GB used / [\d.]+GB limit)", re.DOTALL)
_NEED_LESS_MEMORY = (
    "lower max_concurrent or ranks_per_trial in the study, or optim.micro_batch in its base"
)


_SIGNS_OF_MEMORY = ("out of memory", "out of device memory")


def with_half_batches(run: Mapping[str, Any], failure: str) -> dict[str, Any] | None:
    """The run with half as much at a time, so that its results are the same; None: no use.

    What ran out of memory may be a forward of training or of answering.
    """
    if not any(sign in failure for sign in _SIGNS_OF_MEMORY):
        return None
    config = resolve(run)
    optim, generation = config.optim, config.generation
    size = "micro_batch" if optim.micro_tokens is None else "micro_tokens"
    before = (getattr(optim, size), generation.batch_size)
    halves = tuple(max(1, number // 2) for number in before)
    if halves == before or (size == "micro_batch" and optim.global_batch % halves[0]):
        return None
    return {
        **run,
        "optim": {**run.get("optim", {}), size: halves[0]},
        "generation": {**run.get("generation", {}), "batch_size": halves[1]},
    }


class RankFailure(Exception):
    """A rank's error in words; other exceptions may not survive the way between processes."""


def failure_in_words(error: Exception) -> str:
    """One line: the rank that failed first for a reason of its own, else whichever failed."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    lines = {rank: _root_cause(failure) for rank, failure in sorted(failures.items())}
    if not lines:
        return died_in_words(str(error)) or last_line(str(error))
    own = {rank: line for rank, line in lines.items() if not _is_echo(line)}
    rank, line = next(iter((own or lines).items()))
    return f"rank {rank}: {line}"


def died_in_words(text: str) -> str:
    """What ended a process, if it is that which Ray's text is about."""
    seen = _MEMORY_SEEN.search(text)
    if seen:
        return f"out of memory on its machine ({seen[1]}); {_NEED_LESS_MEMORY}"
    if "process has died" in text or "process died" in text:
        return (
            "its process was killed or crashed; see the trial's logs/, and if they say nothing"
            f" it was out of memory: {_NEED_LESS_MEMORY}"
        )
    return ""


def _root_cause(failure: Exception) -> str:
    cause = getattr(failure, "_base_exc", failure)
    text = str(cause)
    if isinstance(cause, RankFailure):
        return text
    return died_in_words(text) or f"{type(cause).__name__}: {last_line(text)}"


def _is_echo(line: str) -> bool:
    """Whether a rank only noticed that another one is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "NCCL", "recvBytes")
    return any(sign in line for sign in signs)


def last_line(text: str) -> str:
    """The line of a traceback or message that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
