"""One process's share of a run: folder and lock, log, recorder, signals, and how it ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmtrain import distributed
from mmtrain.config.schema import RunConfig
from mmtrain.distributed import World
from mmtrain.errors import MmtrainError, Terminated, TrainingError
from mmtrain.main_rank import on_main, worded
from mmtrain.safe_text import presentable
from mmtrain.tracking.state import load_state
from mmtrain.tracking.tracker import sync
from mmtrain.tracking.uri import is_redacted
from mmtrain.training.recorder import Recorder, RunRecorder
from mmtrain.training.run_folder import (
    exclusive,
    make_folder,
    read_status,
    store_run,
    write_failure,
    write_status,
)
from mmtrain.training.termination import ending_in_order

log = logging.getLogger("mmtrain")
SENT_WITHIN_S = 30.0
STOPPED_WITHIN_S = 4.0  # who sends SIGTERM kills soon after


@dataclass
class Session:
    """A run as one rank holds it, from the moment its folder is taken."""

    config: RunConfig
    world: World
    run_dir: Path
    finished: dict[str, float] | None = None  # the metrics of a run that has ended well already
    recorder: Recorder = field(default_factory=Recorder)

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig) -> Iterator[Session]:
        """Take the folder and write down inside it how the run goes, and why it failed."""
        world = distributed.initialise()
        with ExitStack() as held:
            session = cls(config, world, *on_main(lambda: open_folder(config, held)))
            if session.finished is None:
                held.enter_context(ending_in_order(lambda: session.fail(Terminated())))
                held.enter_context(session._failing())
                set_up_logging(session.run_dir, world.rank)
                on_main(session._open_recorder)
            yield session

    def _open_recorder(self) -> None:
        self.recorder = RunRecorder(self.run_dir, self.config)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever ends the run is written down before it goes on its way."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            failure = _out_of_memory(self.config, error)
            self.fail(failure)
            raise failure from error
        except BaseException as error:
            self.fail(error)
            raise

    def finish(
        self, metrics: dict[str, float], best_step: int, step: int, artifacts: Sequence[Path]
    ) -> None:
        """Say that the run is finished. Rank 0 only."""
        self.recorder.refuse_fault()
        # What the tracker owes comes first: killed after the status, it can still be sent.
        self.recorder.end("FINISHED", artifacts)
        write_status(self.run_dir, "finished", metrics=metrics, best_step=best_step, step=step)
        self.recorder.wait_until_sent(SENT_WITHIN_S)
        log.info("finished at step %d; best step %d; %s", step, best_step, self.run_dir)

    def fail(self, error: BaseException) -> None:
        """Write down why the run ended, on any rank: rank 0 may wait for this one for ever."""
        stopped, first = isinstance(error, Terminated | KeyboardInterrupt), False
        reason = worded(error)
        if not (stopped or self.world.is_main):
            reason = f"rank {self.world.rank}: {reason}"
        try:
            if read_status(self.run_dir).get("state") == "finished":
                return  # stopped while its last results were sent: they are, or will be
            try:
                first = write_failure(self.run_dir, reason)
            finally:
                self.recorder.end("KILLED" if stopped and first else "FAILED")
        except (OSError, MmtrainError) as fault:
            # On a full disk the user must see what ended the run, not that this was not written.
            log.warning("the end of the run could not be written down (%s)", fault)
        self.recorder.wait_until_sent(STOPPED_WITHIN_S if stopped else SENT_WITHIN_S)


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


def _out_of_memory(config: RunConfig, error: torch.OutOfMemoryError) -> TrainingError:
    """The device's complaint with the settings that matter."""
    return TrainingError(
        f"out of device memory with micro_batch {config.optim.micro_batch} and"
        f" generation.batch_size {config.generation.batch_size} ({str(error).splitlines()[0]}).",
        "Lower the one in use (the global batch and so the result stay the same), set"
        " parallel.activation_checkpointing: true, or use parallel.deepspeed: zero3.",
    )


def set_up_logging(run_dir: Path, rank: int) -> None:
    """One file per rank; rank 0 also speaks on the terminal."""
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    # A log on a full disk must not bury the error itself under tracebacks of its own.
    logging.raiseExceptions = False
    path = run_dir / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path)
    except OSError as error:
        raise MmtrainError(
            f"{path}: cannot be written ({error.strerror}).", "Make room and rights there."
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    file.addFilter(_presentable)
    log.addHandler(file)
    if rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        terminal.addFilter(_presentable)
        log.addHandler(terminal)


def _presentable(record: logging.LogRecord) -> bool:
    """Messages repeat settings and errors of libraries: no secret goes into a log."""
    lines = record.getMessage().split("\n")
    record.msg, record.args = "\n".join(map(presentable, lines)), None
    return True
