"""Stored runs, read back for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtrain.errors import nearest
from mmtrain.safe_text import redact_uri
from mmtrain.tasks.interface import Metric
from mmtrain.tracking.client import (
    KIND_TAG,
    PARENT_TAG,
    STUDY_KIND,
    TrackingError,
    connect,
    remote_errors,
)
from mmtrain.tracking.declared import declared_in_tags
from mmtrain.tracking.uri import resolve_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FINISHED = "FINISHED"
_PAGE = 1000


@dataclass(frozen=True)
class StoredRun:
    """One run as MLflow keeps it; `metrics` are last values."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    def declared(self, metric: str) -> Metric | None:
        """Which way and in what a metric is counted; None if an older version stored the run."""
        return declared_in_tags(self.tags).get(metric)


class RunStore:
    """Read-only view of a tracking store."""

    def __init__(self, uri: str) -> None:
        self.uri = resolve_uri(uri)
        path = sqlite_path(self.uri)
        if path is not None and not path.exists():
            # Connecting would create an empty database and then find nothing in it.
            raise TrackingError(
                f"there is no tracking database {path}.",
                "Give its address with --uri, e.g. --uri sqlite:////path/to/mlflow.db.",
            )
        with remote_errors(self.uri):
            self._client: MlflowClient = connect(self.uri)

    def runs(self, experiment: str, study: str | None = None) -> list[StoredRun]:
        """Every run of an experiment, or of one study in it; studies' parent runs left out."""
        with remote_errors(self.uri):
            found = [_stored(run) for run in self._search(experiment)]
        if study is not None:
            found = _of_study(found, study)
        return [run for run in found if run.tags.get(KIND_TAG) != STUDY_KIND]

    def points(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """A metric's values by step."""
        with remote_errors(self.uri):
            history = self._client.get_metric_history(run_id, metric)
        return sorted((point.step, point.value) for point in history)

    def _search(self, experiment: str) -> list[Run]:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            names = [other.name for other in self._client.search_experiments()]
            raise TrackingError(
                f"there is no experiment '{experiment}' in {redact_uri(self.uri)}:",
                nearest(experiment, names),
            )
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [found.experiment_id], max_results=_PAGE, page_token=token
            )
            runs.extend(page)
            token = page.token
            if not token:
                return runs


def _stored(run: Run) -> StoredRun:
    return StoredRun(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
    )


def _of_study(runs: list[StoredRun], study: str) -> list[StoredRun]:
    """The trials under the parent runs with that id or name."""
    parents = {run.tags[PARENT_TAG] for run in runs if PARENT_TAG in run.tags}
    studies = {
        run.run_id: run.name
        for run in runs
        if run.run_id in parents or run.tags.get(KIND_TAG) == STUDY_KIND
    }
    matching = {run_id for run_id, name in studies.items() if study in (run_id, name)}
    if not matching:
        raise TrackingError(f"there is no study '{study}':", nearest(study, studies.values()))
    return [run for run in runs if run.tags.get(PARENT_TAG) in matching]
