"""Where an agent keeps the run file that its ranks read: a folder that is gone soon after it.

An agent holds a lock on its folder. One that is killed outright cannot clear its folder away, but
its lock goes with it: the next agent of the same user here removes what nobody holds.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmtrain.files import lock

_PREFIX = "mmtrain-launch-"


@contextlib.contextmanager
def run_file_folder() -> Iterator[Path]:
    """A private folder, gone afterwards."""
    remove_abandoned()
    folder, handle = _held_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned() -> None:
    """Remove the folders of this user whose agent is gone; links and other users' stay."""
    for entry in os.scandir(tempfile.gettempdir()):
        if entry.name.startswith(_PREFIX):
            with contextlib.suppress(OSError):  # held, no folder, or gone by now
                _remove_unless_held(entry.path)


def _remove_unless_held(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            return
        if not lock(handle):
            return
        # By the handle, not by the path: nobody can put another folder in its place.
        for name in os.listdir(handle):
            os.unlink(name, dir_fd=handle)
        os.rmdir(path)
    finally:
        os.close(handle)


def _held_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):  # before it was locked, another removed it
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            # Where folders cannot be locked, no other agent can lock and remove this one either.
            with contextlib.suppress(OSError):
                lock(handle, math.inf)
            if folder.exists():
                return folder, handle
            os.close(handle)
