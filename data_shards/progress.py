"""What a person sees while shards are written or read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_shards.build import OnSamples

_SECONDS_BETWEEN = 0.1


class Counter:
    """A progress line that a callback moves."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._line = progress.add_task(title, total=None)

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show `done` of `total` steps."""
        self._progress.update(self._line, completed=done, total=total)


@contextmanager
def counting(title: str) -> Iterator[Counter]:
    """Samples that are done, of nobody knows how many."""
    columns = (TextColumn("{task.description}: {task.completed:,} samples"), TimeElapsedColumn())
    with _progress(*columns) as progress:
        yield Counter(progress, title)


@contextmanager
def measuring(title: str) -> Iterator[Counter]:
    """Bytes that are done."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        yield Counter(progress, title)


@contextmanager
def building(title: str) -> Iterator[OnSamples | None]:
    """A bar for what is written and one for what is looked at; None where nobody would see them.

    Who is seen counts the samples beforehand.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        yield None if progress.disable else _Bars(progress, title)


class _Bars:
    """Samples written and looked at, drawn again a few times a second."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._lines = [
            progress.add_task(f"{title}: {what}", total=None, rate="")
            for what in ("written", "looked at")
        ]
        self._first: tuple[int, int] | None = None  # a build may go on behind others
        self._first_s = self._drawn_s = time.monotonic()

    def __call__(self, written: int, looked_at: int, expected: int) -> None:
        """Show how many are done of those that are expected."""
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._first_s = (written, looked_at), now_s
        if now_s - self._drawn_s < _SECONDS_BETWEEN:
            return
        self._drawn_s = now_s
        passed_s = now_s - self._first_s
        dones = zip(self._lines, self._first, (written, looked_at), strict=True)
        for line, first, done in dones:
            rate = f"{(done - first) / passed_s:,.0f}/s" if passed_s else ""
            total = max(expected, written)
            self._progress.update(line, completed=done, total=total, rate=rate)


def _progress(*columns: ProgressColumn) -> Progress:
    """Progress on the terminal only, gone when done: a log keeps the results, not the bars."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
