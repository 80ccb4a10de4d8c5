"""Shard folders behind a URL: what may be one, and how its files come here and go there.

Credentials come from where the store's own library looks for them, never from the URL, which run
files, logs and trackers repeat.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from mmtrain.errors import ConfigError, DataError, nearest
from mmtrain.safe_text import presentable

log = logging.getLogger("mmtrain")

_Result = TypeVar("_Result")

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_LOCAL = ("file", "local")
_UNLISTED = ("http://", "https://")  # pages with links, at best
# Between tries. Training goes on when a store was away for a minute; who opens a folder is there,
# and wants to know.
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_OPENING_WAITS_S = (0.5, 1.0)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Nothing that waiting would mend.
_LASTING = (FileNotFoundError, PermissionError, ImportError, DataError)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of some store; `url` has no secret in it and no slash at its end."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def read(self, name: str, max_bytes: int) -> bytes:
        """A small file; OSError where it is not there or larger."""
        system, path = self._opened()
        end = max_bytes + 1
        data: bytes = self._try(
            name, lambda: system.cat_file(f"{path}/{name}", start=0, end=end), _OPENING_WAITS_S
        )
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", self / name)
        return data

    def sizes(self) -> dict[str, int]:
        """Files by name, and their bytes; empty where the store does not list them."""
        if self.url.startswith(_UNLISTED):
            return {}
        system, path = self._opened()
        system.invalidate_cache()  # of listings
        try:
            listed = self._try("", lambda: system.ls(path, detail=True), _OPENING_WAITS_S)
        except FileNotFoundError:
            return {}
        files = (one for one in listed if one["type"] == "file" and one.get("size") is not None)
        return {one["name"].rpartition("/")[2]: one["size"] for one in files}

    def fetch(self, name: str, target: Path, num_bytes: int) -> None:
        """A whole file; what is cut short on its way is fetched again."""
        system, path = self._opened()

        def transfer() -> None:
            system.get_file(f"{path}/{name}", str(target))
            found = target.stat().st_size
            if found != num_bytes:
                raise OSError(errno.EIO, f"{found} bytes came instead of {num_bytes}")

        try:
            self._try(name, transfer)
        except FileNotFoundError as fault:
            raise DataError(f"'{self / name}' is not there;", _PUSH_AGAIN) from fault

    def put(self, name: str, source: Path) -> None:
        """Send a file there, in the place of what has its name."""
        system, path = self._opened()
        self._try(name, lambda: system.put_file(str(source), f"{path}/{name}"))
        system.invalidate_cache()
        found = self._try(name, lambda: system.info(f"{path}/{name}"))["size"]
        if found != source.stat().st_size:
            raise DataError(f"'{self / name}' has {found} bytes after it was sent;", "send again.")

    def remove(self, name: str) -> None:
        """Take a file away there."""
        system, path = self._opened()
        self._try(name, lambda: system.rm_file(f"{path}/{name}"))

    def _opened(self) -> tuple[Any, str]:
        return _file_system(self.url, os.getpid())

    def _try(
        self, name: str, action: Callable[[], _Result], waits_s: Sequence[float] | None = None
    ) -> _Result:
        """Again after a while, where something fails that may pass: libraries raise anything."""
        place = self / name if name else self.url
        for wait_s in (*(_WAITS_S if waits_s is None else waits_s), None):
            try:
                return action()
            except FileNotFoundError as fault:
                raise FileNotFoundError(errno.ENOENT, "there is none", place) from fault
            except Exception as fault:
                if isinstance(fault, OSError) and fault.errno in _DISK_FULL:
                    raise
                if isinstance(fault, _LASTING) or wait_s is None:
                    raise _refused(place, fault) from fault
                log.warning("'%s': %s; again in %g s", place, _said(fault), wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


Place = Path | RemoteFolder
_PUSH_AGAIN = "send the folder again: `mmtrain shards push DIR URL --overwrite`."


def place_of_shards(text: str | Path | RemoteFolder) -> Place:
    """A folder here, or behind a URL."""
    if not isinstance(text, str):
        return text
    problem = url_problem(text)
    if problem is not None:
        raise ConfigError([problem], "shard folder")
    found = _URL.match(text)
    if found is None:
        return Path(text)
    if found["scheme"].lower() in _LOCAL:
        return Path(found["rest"])
    return RemoteFolder(text.rstrip("/"))


def url_problem(text: str) -> str | None:
    """Why a URL can name no shard folder, told without its secrets; None for a good one or a path.

    Chains (`simplecache::s3://…`) would keep copies that nobody bounds or checks.
    """
    if "://" in text and "::" in text:
        return "chains of file systems ('::') are not read; give the URL of the store alone"
    found = _URL.match(text)
    if found is None or found["scheme"].lower() in _LOCAL:
        return None
    scheme, rest = found["scheme"], found["rest"]
    if "?" in rest or "#" in rest or ":" in rest.rpartition("@")[0]:
        return (
            f"a URL '{scheme}://…' with a password, a query or a fragment is not taken, as run"
            " files and logs would repeat it; leave it out and give credentials where the store's"
            " library looks for them (environment, its own files)"
        )
    if not rest.strip("/"):
        return f"'{scheme}://' names no folder; give one, as in {scheme}://bucket/folder"
    from fsspec import available_protocols

    if scheme not in available_protocols():
        known = nearest(scheme, available_protocols())
        return f"'{scheme}://' is no kind of store that fsspec knows; {known}"
    return None


# Kept by process, as connections do not outlive a fork; fsspec's own would be kept by thread.
@lru_cache(maxsize=32)
def _file_system(url: str, process_id: int) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url, skip_instance_cache=True)
    except (ImportError, ValueError) as fault:
        scheme = url.partition(":")[0]
        package = "pip install 'mmtrain[s3]'" if scheme in ("s3", "s3a") else "install it"
        raise DataError(
            f"'{url}': fsspec cannot open it ({_said(fault)});", f"{package}, or correct the URL."
        ) from fault
    return system, str(path).rstrip("/")


def _said(fault: Exception) -> str:
    return presentable(f"{type(fault).__name__}: {fault}")


def _refused(place: str, fault: Exception) -> DataError:
    if isinstance(fault, PermissionError):
        remedy = "check the credentials, and what they may read and write there."
    else:
        remedy = "check the URL, the network and the credentials (environment, library's files)."
    return DataError(f"'{place}' cannot be reached ({_said(fault)});", remedy)
