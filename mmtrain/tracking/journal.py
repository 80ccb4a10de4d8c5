"""The journal of a run: one JSON object per line, the truth that every tracker is fed from.

Writing a line is the only cost that training pays for being tracked. A process killed in the
middle of a line leaves half of it; readers skip it and the next writer removes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmtrain.errors import DataError
from mmtrain.files import replace_file

JOURNAL_NAME = "metrics.jsonl"
# Of a line: no JSON or too deep, other fields than ours, a step of Infinity.
_FAULTS = (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class JournalEntry:
    """What was measured at one optimizer step."""

    step: int
    epoch: float
    time_s: float
    metrics: dict[str, float]


class RunJournal:
    """Appends to a journal; opening it removes a half-written last line."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_half_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(
        self, step: int, epoch: float, metrics: Mapping[str, float], time_s: float | None = None
    ) -> None:
        """Write one line and hand it to the operating system before returning."""
        entry = {
            "step": int(step),
            "epoch": float(epoch),
            "time_s": time.time() if time_s is None else time_s,
            "metrics": {name: float(value) for name, value in metrics.items()},
        }
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> int:
        """Remove the lines beyond `step`, which a resumed run measures again; returns how many."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        entries = [parse_line(line, self.path, number) for number, line in enumerate(lines, 1)]
        kept = [line for line, entry in zip(lines, entries, strict=True) if entry.step <= step]
        if len(kept) == len(lines):
            return 0
        self._file.close()
        replace_file(self.path, b"".join(kept), sync=True)
        self._file = self.path.open("a", encoding="utf-8")
        return len(lines) - len(kept)

    def missing_steps(self, step: int) -> list[int]:
        """Which of the steps 1 to `step` have no line: somebody cut or removed the file."""
        found = {entry.step for entry in RunJournal.read(self.path)}
        return [number for number in range(1, step + 1) if number not in found]

    def close(self) -> None:
        """Close the file; the journal can be opened again."""
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[JournalEntry]:
        """Every complete line of the journal; none when the file does not exist."""
        path = Path(path)
        if not path.exists():
            return []
        with path.open("rb") as file:
            return [
                parse_line(line, path, number)
                for number, line in enumerate(file, start=1)
                if line.endswith(b"\n")
            ]


def read_from(path: Path, offset: int, max_metrics: int) -> tuple[list[JournalEntry], int]:
    """Some complete lines from a byte offset on, and the offset behind the last of them."""
    entries: list[JournalEntry] = []
    num_metrics = 0
    with path.open("rb") as file:
        file.seek(offset)
        while num_metrics < max_metrics:
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            entries.append(parse_line(line, path))
            num_metrics += len(entries[-1].metrics)
            offset += len(line)
    return entries, offset


def parse_line(line: bytes, path: Path, number: int | None = None) -> JournalEntry:
    """One line as an entry; a line that is complete and still unreadable is an error."""
    try:
        fields = json.loads(line)
        return JournalEntry(
            int(fields["step"]),
            float(fields["epoch"]),
            float(fields["time_s"]),
            {str(name): float(value) for name, value in fields["metrics"].items()},
        )
    except _FAULTS as error:
        place = f"{path}:{number}" if number else str(path)
        raise DataError(
            f"{place}: not a journal line: {line[:80]!r} ({type(error).__name__}: {error}).",
            "Remove that line, or move the file away to start a new journal.",
        ) from error


def _remove_half_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        _cut_behind_last_newline(file)


def _cut_behind_last_newline(file: IO[bytes], block_bytes: int = 65536) -> None:
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(0, position - block_bytes)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            if start + newline + 1 < end:
                file.truncate(start + newline + 1)
            return
        position = start
    file.truncate(0)
