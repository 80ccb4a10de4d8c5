"""The files of one run, and the decision whether to start, resume or leave it as it is."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtrain.config.load import difference, dump_run, flatten_run, load_run_file
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.safe_text import redacted

# What may change between a run and its resume: how it is computed, not what is computed.
_LAYOUT_KEYS = (
    "parallel.",
    "tracking.",
    "checkpoint.",
    "optim.micro_batch",
    "data.workers",
    "generation.batch_size",
)
_STATUS = "status.json"


def write_json(path: Path, value: Any) -> None:
    """Replace a small JSON file at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json, or an empty status."""
    try:
        return json.loads((run_dir / _STATUS).read_text())
    except (OSError, ValueError):
        return {}


def write_status(run_dir: Path, state: str, **facts: Any) -> None:
    """Say what became of the run: running, finished or failed."""
    write_json(run_dir / _STATUS, {"state": state, "time_s": time.time(), **facts})


def prepare(config: RunConfig) -> Path:
    """Make the folder, or check that it belongs to this very run. Rank 0 only."""
    run_dir = Path(config.run_dir)
    stored = run_dir / "run.yaml"
    if stored.exists():
        refuse_other_run(config, stored)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(13, "Permission denied")
        temporary = run_dir / ".run.yaml.tmp"
        temporary.write_text(dump_run(_without_secrets(config)))
        temporary.replace(stored)
    except OSError as error:
        raise MmtrainError(
            f"output_dir: {run_dir} cannot be written ({error.strerror}).",
            "Choose another output_dir, or make room and rights there.",
        ) from error
    return run_dir


def _without_secrets(config: RunConfig) -> RunConfig:
    """The run file as stored: passwords, in the tracking URI or in tags, stay out of it."""
    tracking = config.tracking.model_copy(update=redacted(config.tracking.model_dump()))
    return config.model_copy(update={"tracking": tracking})


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the folder: two trainings of one run would overwrite each other's files."""
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MmtrainError(
                f"{run_dir} is being trained by another process.",
                "Wait for it, end it, or choose another name or output_dir.",
            ) from error
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


def check_inputs(state: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """A resume needs the same base weights and the same shards, bit for bit."""
    problems = [
        f"{name}: has changed since the checkpoint was written ({old[:12]} -> {inputs[name][:12]})"
        for name, old in state["inputs"].items()
        if inputs.get(name) != old
    ]
    if problems:
        raise ConfigError(problems + ["restore it, or give the run another output_dir"], "resume")
