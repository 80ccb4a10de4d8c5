"""What a person sees while a run goes on: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType

from mmtrain.safe_text import presentable

log = logging.getLogger("mmtrain")
_SECONDS_BETWEEN_LINES = 15.0


def set_up_logging(run_dir: Path, rank: int) -> None:
    """One file per rank; rank 0 also speaks on the terminal."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    # A log on a full disk must not bury the error itself under tracebacks of its own.
    logging.raiseExceptions = False
    file = logging.FileHandler(folder / f"rank-{rank}.log")
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


class Progress:
    """A bar over `total` of something; silent on other ranks."""

    def __init__(self, label: str, total: int, enabled: bool, start: int = 0) -> None:
        self._label, self._total, self._enabled = label, total, enabled
        self._last_line_s = self._started_s = time.monotonic()
        self._first = start
        self._bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn
            from rich.progress import Progress as RichProgress
            from rich.progress import TextColumn, TimeRemainingColumn

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self._enabled and now - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = now
            rate = (done - self._first) / (now - self._started_s)
            left_s = (self._total - done) / rate if rate else 0.0
            log.info("%s %d/%d %s (%.0f s left)", self._label, done, self._total, note, left_s)
