"""The files of one run, and the decision whether to start, resume or leave it as it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypedDict

from mmtrain.config.load import difference, dump_run, flatten_run, load_run_file
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError, MmtrainError, Terminated
from mmtrain.files import lock, replace_file, write_json
from mmtrain.safe_text import redacted

# What may change between a run and its resume: how it is computed, not what is computed.
_LAYOUT_KEYS = (
    "parallel.",
    "tracking.",
    "checkpoint.",
    "optim.micro_batch",
    "optim.micro_tokens",
    "data.cut",
    "data.workers",
    "data.cache_dir",
    "data.cache_gib",  # where it changes the order, the inputs say so
    "generation.batch_size",
)
_STATUS = "status.json"
Ended = Literal["FINISHED", "FAILED", "KILLED"]  # MLflow's words
BASE_FILE = "base/"  # before the name of a small file of the base, among a run's inputs


class InUse(MmtrainError):
    """Another process trains in this folder."""


class RunStatus(TypedDict, total=False):
    """status.json. A finished run has metrics, best_step and step, a failed one its reason."""

    state: str
    time_s: float
    metrics: dict[str, float]
    best_step: int
    step: int
    reason: str


def read_status(run_dir: Path) -> RunStatus:
    """status.json; an empty status where there is none yet."""
    path = run_dir / _STATUS
    try:
        status: RunStatus = json.loads(path.read_text())
        usable = status["state"] in ("running", "failed") or (
            status["state"] == "finished"
            and isinstance(status["best_step"], int)
            and all(isinstance(value, int | float) for value in status["metrics"].values())
        )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unusable_status(path, f"{type(error).__name__}: {error}") from error
    if not usable:
        raise _unusable_status(path, f"state {str(status['state'])[:40]!r}")
    return status


def _unusable_status(path: Path, fault: str) -> MmtrainError:
    return MmtrainError(
        f"{path}: says nothing usable about the run ({fault}).",
        "Remove it: the same command then goes on from the last checkpoint.",
    )


def write_status(run_dir: Path, state: str, **facts: object) -> None:
    """Say what became of the run: running, finished or failed."""
    write_json(run_dir / _STATUS, {"state": state, "time_s": time.time(), **facts})


def write_failure(run_dir: Path, reason: str) -> bool:
    """Say why the run failed, unless a rank already has: the others fail because the first did."""
    if read_status(run_dir).get("state") != "running":
        return False
    write_status(run_dir, "failed", reason=reason)
    return True


def note_failure(run_dir: Path, reason: str) -> None:
    """Say why a run failed whose ranks could not: killed, or only told to stop. From outside."""
    with suppress(MmtrainError, OSError), exclusive(run_dir):
        status = read_status(run_dir)
        if status.get("state") == "running" or status.get("reason") == str(Terminated()):
            write_status(run_dir, "failed", reason=reason)


def ended_as(run_dir: Path) -> Ended | None:
    """How a run ended that nobody trains any more; None while it is trained."""
    if not (run_dir / _STATUS).exists():
        return None
    try:
        with exclusive(run_dir):
            state = read_status(run_dir)["state"]
    except InUse:
        return None
    # Nobody holds a folder that says "running": its ranks were killed.
    words: dict[str, Ended] = {"finished": "FINISHED", "failed": "FAILED"}
    return words.get(state, "KILLED")


def make_folder(config: RunConfig) -> Path:
    """The run's folder, made where it is missing."""
    run_dir = Path(config.run_dir)
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(13, "Permission denied")
    return run_dir


def store_run(config: RunConfig, run_dir: Path) -> None:
    """Write run.yaml, or check that the folder belongs to this very run. Only while it is held."""
    stored = run_dir / "run.yaml"
    if stored.exists():
        refuse_other_run(config, stored)
    with _writing(run_dir):
        replace_file(stored, dump_run(_without_secrets(config)))


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MmtrainError(
            f"output_dir: {run_dir} cannot be written ({error.strerror}).",
            "Choose another output_dir, or make room and rights there.",
        ) from error


def _without_secrets(config: RunConfig) -> RunConfig:
    """The run file as stored: passwords, in the tracking URI or in tags, stay out of it."""
    tracking = config.tracking.model_copy(update=redacted(config.tracking.model_dump()))
    return config.model_copy(update={"tracking": tracking})


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the folder: two trainings of one run would overwrite each other's files."""
    with open(run_dir / ".lock", "a") as file:
        if not lock(file):
            raise InUse(
                f"{run_dir} is being trained by another process.",
                "Wait for it, end it, or choose another name or output_dir.",
            )
        yield


def refuse_other_run(config: RunConfig, stored: Path) -> None:
    """A different run file in the same folder is an error that shows the difference."""
    found = load_run_file(stored)
    before, now = flatten_run(found), flatten_run(config)
    changed = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} in this run"
        for key in difference(found, config)
        if not key.startswith((*_LAYOUT_KEYS, "output_dir"))
    ]
    if changed:
        raise ConfigError(
            [f"{line} (stored in {stored})" for line in changed]
            + ["this folder holds another run: choose another name or output_dir, or delete it"],
            str(stored.parent),
        )


def check_inputs(stored: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """A resume needs the same base and the same shards, bit for bit."""
    problems = [
        f"{name}: has changed since the checkpoint was written"
        f" ({old[:12]} -> {inputs.get(name, 'gone')[:12]})"
        for name, old in stored.items()
        if inputs.get(name) != old
    ]
    if any(name.startswith(BASE_FILE) for name in stored):
        new = sorted(name for name in inputs if name.startswith(BASE_FILE) and name not in stored)
        problems += [f"{name}: has been added since the checkpoint was written" for name in new]
    if problems:
        raise ConfigError(problems + ["restore it, or give the run another output_dir"], "resume")
