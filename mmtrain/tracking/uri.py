"""Tracking URIs: absolute where they name a file, and without secrets wherever they are shown."""

from __future__ import annotations

import os
from pathlib import Path

from mmtrain.safe_text import HIDDEN, redact_uri, replace_userinfo

DISABLED = "none"
URI_EXAMPLES = "sqlite:///mlflow.db, the address of a server (http://host:port) or none"


def is_redacted(uri: str) -> bool:
    """Whether a stored URI lost its credentials."""
    return HIDDEN in uri


def without_userinfo(uri: str) -> str:
    """A web address without `user:password@`: MLflow then takes them from its variables."""
    return replace_userinfo(uri, "") if uri.startswith(("http://", "https://")) else uri


def uri_problem(uri: str) -> str | None:
    """What MLflow would refuse late: a folder instead of a database or a server."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme and scheme != "file":
        return None
    return f"'{redact_uri(uri)}' is a folder, which MLflow no longer takes"


def resolve_uri(uri: str) -> str:
    """The URI with a relative sqlite path made absolute against the current folder."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    return f"sqlite:///{Path(os.path.abspath(path))}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, None for any other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])
