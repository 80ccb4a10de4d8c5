"""One way to MLflow: short timeouts, a lock around a database's first use, errors as one line."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import MmtrainError
from mmtrain.files import lock
from mmtrain.safe_text import redact, redact_uri, redacted
from mmtrain.tracking.fields import MAX_TAG_CHARS, cut, valid_key
from mmtrain.tracking.uri import URI_EXAMPLES, resolve_uri, sqlite_path, uri_problem

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
KIND_TAG = "mmtrain.kind"
STUDY_KIND = "study"
# The holder creates a database or an experiment: MLflow's migrations take some ten seconds.
FIRST_USE_LIMIT_S = 120.0
# MLflow's own defaults are 7 retries of up to 120 s each: minutes per call to a dead server.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It would print the address of the run, password included.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackingError(MmtrainError):
    """The tracking server or database cannot be used."""


def prepare_environment() -> None:
    """Set what MLflow reads at import; a value the user set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_uri(uri: str) -> None:
    """Refuse early what MLflow would refuse late: folders instead of a database."""
    problem = uri_problem(uri)
    if problem:
        raise TrackingError(f"tracking.uri {problem}.", f"Use {URI_EXAMPLES}.")


def connect(uri: str) -> MlflowClient:
    """A client for an absolute URI; creates a sqlite database that does not exist yet."""
    prepare_environment()
    with _first_use_lock(uri):
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri)
        if sqlite_path(uri) is not None:
            client.search_experiments(max_results=1)  # creates or migrates, inside the lock
    return client


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created when it is new."""
    from mlflow.exceptions import MlflowException

    with _first_use_lock(uri):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, _artifact_location(uri, name))
            except MlflowException as error:
                # Another host may have created it since.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow experiment '{name}' was deleted.",
            "Restore it (mlflow experiments restore) or choose another tracking.experiment.",
        )
    return found.experiment_id


def explain(error: Exception, uri: str) -> str:
    """An error of MLflow as one short line without secrets."""
    lines = redact(str(error)).strip().splitlines()
    text = lines[0] if lines else ""
    if "Max retries exceeded" in text or "timed out" in text:
        return f"{redact_uri(uri)} does not answer"
    return f"{redact_uri(uri)}: {type(error).__name__}: {text[:200]}"


def parent_run(
    uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
) -> str:
    """Create the run that a study's trials hang under (tag `mlflow.parentRunId`); its id."""
    from_user = {key: cut(value, MAX_TAG_CHARS) for key, value in redacted(tags or {}).items()}
    with remote_errors(uri):
        uri = resolve_uri(uri)
        client = connect(uri)
        run = client.create_run(
            experiment_id(client, uri, experiment),
            run_name=name,
            tags=from_user | {KIND_TAG: STUDY_KIND},
        )
        for key, value in redacted(params or {}).items():
            client.log_param(run.info.run_id, valid_key(key), cut(value))
    return str(run.info.run_id)


def end_parent_run(
    uri: str,
    run_id: str,
    status: str = "FINISHED",
    metrics: Mapping[str, float] | None = None,
    artifacts: Sequence[Path] = (),
) -> None:
    """Close a study's parent run with its results."""
    with remote_errors(uri):
        client = connect(resolve_uri(uri))
        for key, value in (metrics or {}).items():
            client.log_metric(run_id, valid_key(key), value)
        for path in artifacts:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, status)


@contextmanager
def remote_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a TrackingError that says what to do."""
    check_uri(uri)
    try:
        yield
    except MmtrainError:
        raise
    except Exception as error:  # MLflow lets errors of requests and sqlalchemy through
        raise TrackingError(
            f"tracking: {explain(error, uri)}.",
            "Check that the server runs and the address is right; an old database needs "
            "`mlflow db upgrade URI`.",
        ) from error


@contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """One process at a time: two that create one sqlite file run the same migrations."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as file:
        if not lock(file, FIRST_USE_LIMIT_S):  # a stopped process keeps its locks for ever
            raise TrackingError(
                f"{file.name} has been held by another process for {FIRST_USE_LIMIT_S:g} s.",
                f"Find it (fuser {file.name}) and end it, then try again.",
            )
        yield


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Beside a sqlite database, wherever the process runs; a server knows its own place."""
    path = sqlite_path(uri)
    if path is None:
        return None
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", experiment)[:60]
    digest = hashlib.sha256(experiment.encode()).hexdigest()[:8]
    return str(path.parent / "mlartifacts" / f"{readable}-{digest}")


def log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, cut to what stores take."""
    from mlflow.entities import RunTag

    entities = [RunTag(valid_key(key), cut(value, MAX_TAG_CHARS)) for key, value in tags.items()]
    for start in range(0, len(entities), 100):
        client.log_batch(run_id, tags=entities[start : start + 100], synchronous=True)
