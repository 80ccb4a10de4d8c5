"""Parameters and tags of a run, as the flat strings that MLflow stores."""

from __future__ import annotations

import getpass
import json
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from mmtrain.safe_text import redacted

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000
MAX_KEY_CHARS = 250
_INVALID_KEY_CHARS = re.compile(r"[^A-Za-z0-9_\-. :/]")
_VERSIONED = ("torch", "transformers", "deepspeed", "peft", "mlflow", "mmtrain")


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys: {optim: {lr: 2e-4}} is {'optim.lr': '0.0002'}."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = _as_text(redacted(value, key))
    return flat


def _as_text(value: object) -> str:
    if value is None or isinstance(value, str | Path):
        return "none" if value is None else str(value)
    if isinstance(value, bool | Mapping) or (isinstance(value, Sequence)):
        return json.dumps(value, default=str)
    return str(value)


def cut(text: str, max_chars: int = MAX_PARAM_CHARS) -> str:
    """The text itself, or its beginning with a note of how long it was."""
    if len(text) <= max_chars:
        return text
    note = f"… [cut: {len(text)} characters]"
    return text[: max_chars - len(note)] + note


def valid_key(key: str) -> str:
    """A metric, parameter or tag name that every MLflow store accepts."""
    return _INVALID_KEY_CHARS.sub("_", key)[:MAX_KEY_CHARS]


def environment_tags() -> dict[str, str]:
    """Where a run came from: commit, versions, host, user."""
    tags = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "mlflow.source.name": "mmtrain",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    tags |= {f"version.{package}": version for package, version in installed_versions().items()}
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def installed_versions() -> dict[str, str]:
    """What computes; mmtrain itself may run from a plain folder, which has no version."""
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id need not have a name
        return "unknown"


def _git_commit() -> str | None:
    """The commit of the current folder, else of mmtrain's own source; None outside of git."""
    for folder in (Path.cwd(), Path(__file__).parent):
        try:
            found = subprocess.run(
                ["git", "rev-parse", "--verify", "HEAD"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=5,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if found.returncode == 0:
            return found.stdout.strip()
    return None
