"""What a run's folder remembers about its MLflow run: which one it is and what is still owed.

How far the metrics were sent is not kept here: the server is asked, because a process may die
between sending a batch and writing down that it was sent.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmtrain.files import replace_file

STATE_NAME = "tracking.json"


@dataclass
class TrackingState:
    """Contents of tracking.json; safe to change from two threads through its methods."""

    uri: str  # absolute, credentials hidden
    uri_setting: str  # as the run file says it, credentials hidden
    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    artifacts_owed: list[tuple[str, str]] = field(default_factory=list)
    final_status: str | None = None
    end_time_ms: int | None = None
    complete: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.artifacts_owed = [(path, target) for path, target in self.artifacts_owed]

    def save(self, run_dir: Path) -> None:
        """Write tracking.json beside and rename it."""
        with self._lock:
            replace_file(run_dir / STATE_NAME, json.dumps(asdict(self), indent=1) + "\n")

    def end_as(self, status: str) -> None:
        """The MLflow run is to be ended, now."""
        self.end_time_ms, self.final_status = int(time.time() * 1000), status

    def owe_artifact(self, path: str, target: str) -> None:
        """Add a file or folder to send; a second one of the same name is one."""
        with self._lock:
            if (path, target) not in self.artifacts_owed:
                self.artifacts_owed.append((path, target))

    def artifact_sent(self, path: str, target: str) -> None:
        """Strike an artifact off."""
        with self._lock:
            self.artifacts_owed.remove((path, target))


def load_state(run_dir: Path) -> TrackingState | None:
    """The state in a run's folder; None when there is none or it is unreadable.

    An unreadable file costs a second MLflow run, which is better than a training that fails.
    """
    try:
        fields = json.loads((run_dir / STATE_NAME).read_text("utf-8"))
        return TrackingState(**fields)
    except (OSError, ValueError, TypeError):
        return None
