"""The tracker of a run: a thread that follows the journal and may fail as it likes.

Training writes the journal and goes on. The thread sends what is there to MLflow, waits longer
after every failure, and starts where the server's own points end. What it could not send before
the run ended stays in the run's folder; `sync` or the next resume sends it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mmtrain.config.schema import TrackingConfig
from mmtrain.safe_text import redact_uri, redacted
from mmtrain.tracking.client import (
    TrackingError,
    check_uri,
    explain,
    prepare_environment,
    remote_errors,
)
from mmtrain.tracking.state import TrackingState, load_state
from mmtrain.tracking.upload import Uploader
from mmtrain.tracking.uri import (
    DISABLED,
    is_redacted,
    resolve_uri,
    sqlite_path,
    without_userinfo,
)

logger = logging.getLogger(__name__)

# Between two uploads: fast steps must not become one database transaction each.
INTERVAL_S = 2.0
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
# Once the run has ended, somebody is waiting.
LONGEST_RETRY_AT_END_S = 1.0

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Made by `Tracker.start`, on rank 0 only. No method blocks on the network or raises."""

    def __init__(self, run_dir: Path, state: TrackingState | None, uri: str) -> None:
        self.run_dir = run_dir
        self._state = state
        self._uri = uri
        self._new_lines = threading.Event()
        self._ending = threading.Event()
        self._abandoned = threading.Event()
        self._outage = False
        self._thread = threading.Thread(target=self._follow, name="mmtrain-tracker", daemon=True)

    @classmethod
    def start(
        cls,
        run_dir: Path,
        settings: TrackingConfig,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> Tracker:
        """Begin to follow the journal in `run_dir`, in the MLflow run it had before, if any.

        Start it after torch and friends are imported: the thread's own imports then find them.
        """
        run_dir = Path(run_dir)
        if settings.uri == DISABLED:
            return cls(run_dir, None, DISABLED)
        check_uri(settings.uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        state, uri = _state_for(run_dir, settings, run_name)
        state.params = redacted(params)
        state.tags = redacted({**settings.tags, **tags})
        prepare_environment()
        tracker = cls(run_dir, state, uri)
        tracker._save(state)
        tracker._thread.start()
        return tracker

    def wake(self) -> None:
        """There are new lines in the journal."""
        self._new_lines.set()

    def artifact(self, path: Path, artifact_path: str = "") -> None:
        """Send a file, or a folder's contents, when there is time; it must stay where it is."""
        if self._state is None:
            return
        absolute = Path(path).absolute()
        inside = absolute.is_relative_to(self.run_dir.absolute())
        # Relative, so that a run folder can be moved before it is sent.
        owed = absolute.relative_to(self.run_dir.absolute()) if inside else absolute
        self._state.owe_artifact(str(owed), artifact_path)
        self._save(self._state)
        self._new_lines.set()

    def end(self, status: Status) -> None:
        """Nothing more will come: write down that the MLflow run is to be ended."""
        if self._state is None:
            return
        self._state.end_as(status)
        self._save(self._state)
        self._ending.set()
        self._new_lines.set()

    def wait_until_sent(self, timeout_s: float) -> bool:
        """After `end`: False when not everything was sent within the time."""
        if self._state is None:
            return True
        self._thread.join(timeout_s)
        if self._state.complete:
            return True
        self._abandoned.set()
        logger.warning(
            "tracking: not everything reached %s within %g s; it is kept in %s. "
            "Send it later: mmtrain report %s --sync",
            redact_uri(self._uri),
            timeout_s,
            self.run_dir,
            self.run_dir,
        )
        return False

    def _save(self, state: TrackingState) -> None:
        try:
            state.save(self.run_dir)
        except OSError as error:
            logger.warning("tracking: cannot write in %s: %s", self.run_dir, error)

    def _follow(self) -> None:
        """The thread: upload, wait for more, and after a failure wait longer each time."""
        state = self._state
        assert state is not None
        uploader = Uploader(self.run_dir, state, self._uri)
        retry_s = FIRST_RETRY_S
        while not self._abandoned.is_set():
            if self._upload_all(uploader):
                retry_s = FIRST_RETRY_S
                if state.complete:
                    return
                self._ending.wait(INTERVAL_S)
                self._new_lines.wait()
                self._new_lines.clear()
            elif self._ending.is_set():
                self._abandoned.wait(min(retry_s, LONGEST_RETRY_AT_END_S))
            else:
                self._ending.wait(retry_s)
                retry_s = min(2 * retry_s, LONGEST_RETRY_S)

    def _upload_all(self, uploader: Uploader) -> bool:
        """Whether everything there was is sent; a failure becomes one line for the whole outage."""
        try:
            for _ in uploader.upload():
                if self._abandoned.is_set():
                    return False
        except Exception as error:  # whatever a server or its client does, training goes on
            uploader.reset()
            if not self._outage:
                logger.warning(
                    "tracking: %s; the journal is kept and sent later", explain(error, self._uri)
                )
            self._outage = True
            return False
        if self._outage:
            logger.info("tracking: %s answers again", redact_uri(self._uri))
        self._outage = False
        return True


def sync(run_dir: Path, uri: str | None = None, ended: Status | None = None) -> str:
    """Send what a run's folder still owes to MLflow; the id of its MLflow run.

    `ended` is how the run ended, where its own process could not write that down. `uri` is needed
    only where the stored one lost its credentials and MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD cannot replace them.
    """
    run_dir = Path(run_dir)
    state = load_state(run_dir)
    if state is None:
        raise TrackingError(
            f"{run_dir} has no tracking.json: the run was not tracked.",
            "Set tracking.uri in the run file and run it again to log it.",
        )
    if state.complete and state.run_id:
        return state.run_id
    if state.final_status is None and ended is not None:
        state.end_as(ended)
    target = resolve_uri(uri) if uri else without_userinfo(state.uri)
    if is_redacted(target):
        raise TrackingError(
            f"the address {state.uri} was stored without its password.", "Give it with --uri."
        )
    uploader = Uploader(run_dir, state, target)
    with remote_errors(target):
        for _ in uploader.upload():
            pass
    return state.run_id or ""


def _state_for(run_dir: Path, settings: TrackingConfig, run_name: str) -> tuple[TrackingState, str]:
    """The state to go on with, and the URI with its credentials."""
    setting = redact_uri(settings.uri)
    uri = resolve_uri(settings.uri)
    state = load_state(run_dir)
    if state and (state.uri_setting, state.experiment) == (setting, settings.experiment):
        database = sqlite_path(state.uri)
        # A relative path means the folder that the run was started in, while that exists.
        if database is not None and database.exists():
            uri = state.uri
        state.uri = redact_uri(uri)
        state.final_status, state.end_time_ms, state.complete = None, None, False
        return state, uri
    fresh = TrackingState(
        uri=redact_uri(uri),
        uri_setting=setting,
        experiment=settings.experiment,
        run_name=run_name,
        params={},
        tags={},
    )
    return fresh, uri
