"""Files: read although they may be anything, replaced whole or not at all, held by one process.

Of what is opened here to be read, a pipe would block for ever and a device would never end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOCK_RETRY_S = 0.1


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, links followed; OSError for a pipe, device or folder."""
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(None, "it is no regular file, but a pipe, device or folder", str(path))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """All bytes of a regular file; OSError where there are more than `max_bytes`."""
    with open(open_regular(path), "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            fault = f"it has {num_bytes} bytes, at most {max_bytes} are expected"
            raise OSError(None, fault, str(path))
        return file.read()


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, fewer only where the file ends; safe from any thread."""
    parts = []
    while size > 0:  # once nearly always; network file systems may return less than asked for
        part = os.pread(descriptor, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes | str, sync: bool = False) -> None:
    """Write a file beside its place and give it its name: readers find the old or the new one.

    Processes may do so side by side. With `sync`, the content is on the disk before the name is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def cache_folder() -> Path:
    """Where this user's programs keep what they could make again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmtrain"


def keep_in_cache(path: Path, content: bytes | str) -> None:
    """Write what could be made again: without a cache it is only made again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError:
        pass


def write_json(path: Path, value: object, sync: bool = False) -> None:
    """Replace a small JSON file."""
    replace_file(path, json.dumps(value, indent=1), sync)


@contextmanager
def replaced_folder(folder: Path, goes_on: bool = False) -> Iterator[Path]:
    """A folder beside its place that takes its name only if the block ends well.

    Killed, it leaves a `.partial` folder that the next one removes; readers never see it. With
    `goes_on`, the block finds what a kill left there, and Ctrl-C leaves it as well.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    before = folder.with_name(f".{folder.name}.replaced")
    left = False
    if not goes_on:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=goes_on)
        yield partial
        sync_folder(partial)
        # What was there goes only after the new folder is in place.
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        try:
            partial.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        sync_folder(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    except KeyboardInterrupt:
        left = goes_on
        raise
    finally:
        if not left:
            shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[str] | IO[bytes] | int, wait_s: float = 0.0) -> bool:
    """Hold an open file or folder until it is closed; False if another process keeps it so long."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_LOCK_RETRY_S)
