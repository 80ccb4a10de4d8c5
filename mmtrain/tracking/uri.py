"""Tracking URIs: absolute where they name a file, and without secrets wherever they are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

DISABLED = "none"
URI_EXAMPLES = "sqlite:///mlflow.db, the address of a server (http://host:port) or none"
HIDDEN = "***"
# Up to the last @ before the path: a password may itself hold an @.
_USERINFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<userinfo>[^/\s?#]*)@")
_SECRET_QUERY = re.compile(r"(?i)(?P<key>[?&](?:password|passwd|token|secret|api_key)=)[^&\s#]+")
_SECRET_VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
# A shorter value would be found inside ordinary words.
_SHORTEST_SECRET = 4


def redact_uri(text: str) -> str:
    """The text with every `user:password@` and `?password=` of its URIs replaced by ***."""
    hidden = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _SECRET_QUERY.sub(rf"\g<key>{HIDDEN}", hidden)


def redact(text: str) -> str:
    """`redact_uri`, and the values of MLflow's credential variables replaced by *** too."""
    text = redact_uri(text)
    for variable in _SECRET_VARIABLES:
        secret = os.environ.get(variable, "")
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def is_redacted(uri: str) -> bool:
    """Whether a stored URI lost its credentials."""
    return HIDDEN in uri


def without_userinfo(uri: str) -> str:
    """A web address without `user:password@`: MLflow then takes them from its variables."""
    return _USERINFO.sub(r"\g<scheme>", uri) if uri.startswith(("http://", "https://")) else uri


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
