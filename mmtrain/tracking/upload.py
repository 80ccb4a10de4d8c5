"""Brings a journal into one MLflow run, each point once. Plain calls that may raise or be slow:
the tracker's thread catches, waits and calls again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.tracking.client import connect, experiment_id, log_tags
from mmtrain.tracking.fields import cut, valid_key
from mmtrain.tracking.journal import JOURNAL_NAME, JournalEntry, read_from
from mmtrain.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

# MLflow takes at most 1,000 metrics, 100 parameters and 100 tags in a call.
METRICS_PER_BATCH = 500
PARAMS_PER_BATCH = 100
RUN_KEY_TAG = "mmtrain.run_key"


class Uploader:
    """The MLflow side of one run folder."""

    def __init__(self, run_dir: Path, state: TrackingState, uri: str) -> None:
        self.run_dir = run_dir
        self.state = state
        self.uri = uri
        self._journal = run_dir / JOURNAL_NAME
        self._client: MlflowClient | None = None
        self._offset_bytes = 0
        self._inode: int | None = None
        self._highest_step: dict[str, int] = {}

    def upload(self) -> Iterator[None]:
        """Everything there is to send now, a piece at a time; ask again for what came since."""
        # Read first: lines written before the run was ended must be sent before it is closed.
        ended = self.state.final_status is not None
        client = self._client or self._open_run()
        while self._upload_batch(client):
            yield
        for path, target in list(self.state.artifacts_owed):
            self._upload_artifact(client, path, target)
            yield
        if ended and not self.state.complete:
            self._terminate(client)

    def reset(self) -> None:
        """Forget the connection after a failure: the next upload asks the server what it holds."""
        self._client = None
        self._offset_bytes = 0

    def _open_run(self) -> MlflowClient:
        """Find or create the MLflow run, mark it running, learn what it already holds."""
        client = connect(self.uri)
        run = self._find_run(client)
        if run is None:
            run = client.create_run(
                experiment_id(client, self.uri, self.state.experiment),
                run_name=self.state.run_name,
                tags={RUN_KEY_TAG: self.state.run_key},
            )
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        run_id = run.info.run_id
        if run_id != self.state.run_id:
            self.state.run_id = run_id
            self.state.save(self.run_dir)
        self._log_params(client, run_id, known=run.data.params)
        log_tags(client, run_id, self.state.tags)
        self._highest_step = {
            name: max(point.step for point in client.get_metric_history(run_id, name))
            for name in run.data.metrics
        }
        self._client = client
        return client

    def _find_run(self, client: MlflowClient) -> Any:
        """By id, else by our own key: an answer lost on the way must not make a second run."""
        from mlflow.exceptions import MlflowException

        if self.state.run_id:
            try:
                run = client.get_run(self.state.run_id)
                return run if run.info.lifecycle_stage == "active" else None
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = client.search_runs(
            [experiment_id(client, self.uri, self.state.experiment)],
            f"tags.`{RUN_KEY_TAG}` = '{self.state.run_key}'",
            max_results=1,
        )
        return found[0] if found else None

    def _log_params(self, client: MlflowClient, run_id: str, known: dict[str, str]) -> None:
        """Only what is not there yet: MLflow raises when a parameter changes."""
        from mlflow.entities import Param

        params = [
            Param(valid_key(key), cut(value))
            for key, value in self.state.params.items()
            if valid_key(key) not in known
        ]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            batch = params[start : start + PARAMS_PER_BATCH]
            client.log_batch(run_id, params=batch, synchronous=True)

    def _upload_batch(self, client: MlflowClient) -> bool:
        """Send some journal lines; False when there are no more."""
        if not self._journal.exists():
            return False
        self._notice_rewrite()
        entries, offset = read_from(self._journal, self._offset_bytes, METRICS_PER_BATCH)
        if not entries:
            return False
        metrics = self._unsent(entries)
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[start : start + METRICS_PER_BATCH]
            client.log_batch(self.state.run_id or "", metrics=batch, synchronous=True)
        # Only after the calls: a batch that failed is read and sent again, and a store drops
        # points it already has because their times come from the journal.
        for metric in metrics:
            self._highest_step[metric.key] = metric.step
        self._offset_bytes = offset
        return True

    def _notice_rewrite(self) -> None:
        """A journal cut back on resume is a new, shorter file: read it from the beginning."""
        status = self._journal.stat()
        if status.st_ino != self._inode or status.st_size < self._offset_bytes:
            self._offset_bytes = 0
            self._inode = status.st_ino

    def _unsent(self, entries: list[JournalEntry]) -> list[Metric]:
        from mlflow.entities import Metric

        return [
            Metric(valid_key(name), value, int(entry.time_s * 1000), entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
            if entry.step > self._highest_step.get(valid_key(name), -1)
        ]

    def _upload_artifact(self, client: MlflowClient, path: str, target: str) -> None:
        source = self.run_dir / path
        run_id = self.state.run_id or ""
        if source.is_dir():
            client.log_artifacts(run_id, str(source), target or source.name)
        elif source.exists():
            client.log_artifact(run_id, str(source), target or None)
        else:
            logger.warning("tracking: %s is gone and was not sent", source)
        self.state.artifact_sent(path, target)
        self.state.save(self.run_dir)

    def _terminate(self, client: MlflowClient) -> None:
        end_time_ms = self.state.end_time_ms or int(time.time() * 1000)
        client.set_terminated(self.state.run_id or "", self.state.final_status, end_time_ms)
        self.state.complete = True
        self.state.save(self.run_dir)
