"""How a run begins: its folder taken, its inputs compared, the checkpoint that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.assemble import Assembled, base_digests
from mmtrain.config.schema import RunConfig
from mmtrain.data.source import Source
from mmtrain.errors import MmtrainError
from mmtrain.tracking.state import load_state
from mmtrain.tracking.tracker import sync
from mmtrain.tracking.uri import is_redacted
from mmtrain.training.checkpoint import CheckpointFolder, read_state_file
from mmtrain.training.ranks import on_main
from mmtrain.training.run_folder import (
    BASE_FILE,
    check_inputs,
    exclusive,
    make_folder,
    read_status,
    store_run,
    write_status,
)

log = logging.getLogger("mmtrain")


@dataclass
class Resume:
    """Where to go on from; the folder is only known to rank 0, which alone reads it."""

    folder: Path | None
    state: dict[str, Any]


def open_folder(config: RunConfig, held: ExitStack) -> tuple[Path, dict[str, float] | None]:
    """Take the run's folder; its metrics if the run is finished. Rank 0 only."""
    run_dir = make_folder(config)
    # Before anything in it is written: it may be another process's.
    held.enter_context(exclusive(run_dir))
    store_run(config, run_dir)
    status = read_status(run_dir)
    if status.get("state") == "finished":
        _send_rest(config, run_dir)
        return run_dir, status["metrics"]
    write_status(run_dir, "running")
    return run_dir, None


def _send_rest(config: RunConfig, run_dir: Path) -> None:
    """A run killed, or without its tracker, at its very end still owes its results."""
    state = load_state(run_dir)
    if state is None or state.complete:
        return
    try:
        sync(run_dir, config.tracking.uri if is_redacted(state.uri) else None, "FINISHED")
    except MmtrainError as error:
        log.warning("%s", error)


def input_digests(
    assembled: Assembled, train: Source, val: Source | None, verify_base: bool
) -> dict[str, str]:
    """What a resume must find unchanged, by name. Rank 0 only: it reads files."""
    base = base_digests(assembled.base_files, verify_base)
    digests = {"base": base.pop("weights"), "data.train": train.shards.digest}
    if val is not None:
        digests["data.val"] = val.shards.digest
    return digests | {f"{BASE_FILE}{name}": digest for name, digest in base.items()}


def find_resume(folder: CheckpointFolder, inputs: Mapping[str, str]) -> Resume | None:
    """The newest good checkpoint, on every rank; what lies beyond it is set aside."""
    state = on_main(lambda: _newest_state(folder, inputs))
    if state is None:
        return None
    log.info("resuming after step %d", state["step"])
    return Resume(folder.path(state["step"]), state)


def _newest_state(folder: CheckpointFolder, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    path = folder.newest_good()
    state = None if path is None else read_state_file(path)
    if state is not None:
        check_inputs(state, inputs)
    elif folder.steps():
        log.warning("no checkpoint is good: training starts again from step 0")
    folder.set_aside_beyond(-1 if state is None else state["step"])
    return state
