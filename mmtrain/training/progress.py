"""What a person sees while a run goes on: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger("mmtrain")
_SECONDS_BETWEEN_LINES = 15.0


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

    def __exit__(self, *error: object) -> None:
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
