"""What rank 0 writes down while a run goes on: the journal, then whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.schema import RunConfig
from mmtrain.tracking.journal import JOURNAL_NAME, RunJournal


class Recorder:
    """The journal of a run and its tracker. Tracking never blocks or fails training."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self._run_dir, self._config = run_dir, config
        self._journal = RunJournal(run_dir / JOURNAL_NAME)

    @classmethod
    def open(cls, run_dir: Path, config: RunConfig) -> Recorder:
        """Open the run's journal."""
        return cls(run_dir, config)

    def start(self, params: Mapping[str, Any], inputs: Mapping[str, str], step: int) -> None:
        """Forget what was written after the step that training goes on from."""
        self._journal.truncate_after(step if step > 0 else -1)

    def record(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """One line of the journal."""
        self._journal.append(step, epoch, metrics)

    def finish(self, written: list[Path], metrics: Mapping[str, float]) -> None:
        """The run is complete."""
        self.close("FINISHED")

    def close(self, status: str) -> None:
        """Say how the run ended."""
        self._journal.close()
