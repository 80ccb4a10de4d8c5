"""Trials fill disks: optimizer checkpoints of trials that nobody will resume are deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from ray_tune.journal import SETTLED, Journal
from ray_tune.study import Study


def drop_checkpoints(study: Study, journal: Journal) -> list[Path]:
    """Delete `checkpoints/` of settled trials as the study says; the folders deleted.

    Adapters and fully trained components stay, as do the checkpoints of a failed trial, which a
    resumed study starts again.
    """
    if study.keep_checkpoints == "all":
        return []
    best = journal.best() if study.keep_checkpoints == "best" else None
    dropped = []
    for record in journal.records.values():
        folder = Path(study.study_dir) / "trials" / record.name / "checkpoints"
        if record.status in SETTLED and record is not best and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            dropped.append(folder)
    return dropped
