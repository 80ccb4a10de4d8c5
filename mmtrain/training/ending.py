"""How a run ends: its results written and sent, or why it failed."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mmtrain.assemble import Assembled
from mmtrain.config.schema import RunConfig
from mmtrain.errors import MmtrainError, Terminated, TrainingError
from mmtrain.training import checkpoint as checkpoints
from mmtrain.training.checkpoint import CheckpointFolder
from mmtrain.training.export import export_trained
from mmtrain.training.loop import Loop
from mmtrain.training.ranks import worded
from mmtrain.training.recorder import Recorder
from mmtrain.training.run_folder import write_failure, write_status

log = logging.getLogger("mmtrain")
SENT_WITHIN_S = 30.0
STOPPED_WITHIN_S = 4.0  # who sends SIGTERM kills soon after


def finish(
    config: RunConfig,
    run_dir: Path,
    folder: CheckpointFolder,
    loop: Loop,
    assembled: Assembled,
    recorder: Recorder,
) -> None:
    """Export the best checkpoint and say that the run is finished. Rank 0 only."""
    best = loop.stopping.best_step
    damage = checkpoints.find_damage(folder.path(best)) if best > 0 else None
    if damage is not None:
        log.warning("best checkpoint step-%d is not exported, the last is: %s", best, damage)
    chosen = best if best > 0 and damage is None else loop.state.step
    written = export_trained(folder.path(chosen), run_dir, config, assembled)
    metrics = loop.state.best_metrics
    # What the tracker owes is written down first: killed after the status, it can still be sent.
    recorder.end("FINISHED", [*written, run_dir / "evaluation" / "val", run_dir / "run.yaml"])
    write_status(run_dir, "finished", metrics=metrics, best_step=chosen, step=loop.state.step)
    recorder.wait_until_sent(SENT_WITHIN_S)
    log.info("finished at step %d; best step %d; %s", loop.state.step, chosen, run_dir)


def fail(run_dir: Path, rank: int, recorder: Recorder | None, error: BaseException) -> None:
    """Write down why the run ended, on whichever rank: rank 0 may wait for this one for ever."""
    stopped, first = isinstance(error, Terminated | KeyboardInterrupt), False
    reason = worded(error) if stopped or rank == 0 else f"rank {rank}: {worded(error)}"
    try:
        try:
            first = write_failure(run_dir, reason)
        finally:
            if recorder is not None:
                recorder.end("KILLED" if stopped and first else "FAILED")
    except (OSError, MmtrainError) as fault:
        # On a full disk the user must see what ended the run, not that this was not written.
        log.warning("the end of the run could not be written down (%s)", fault)
    if recorder is not None:
        recorder.wait_until_sent(STOPPED_WITHIN_S if stopped else SENT_WITHIN_S)


def out_of_memory(config: RunConfig, error: torch.OutOfMemoryError) -> TrainingError:
    """The device's complaint with the settings that matter."""
    return TrainingError(
        f"out of device memory with micro_batch {config.optim.micro_batch} and"
        f" generation.batch_size {config.generation.batch_size} ({str(error).splitlines()[0]}).",
        "Lower the one in use (the global batch and so the result stay the same), set"
        " parallel.activation_checkpointing: true, or use parallel.deepspeed: zero3.",
    )
