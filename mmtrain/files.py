"""Reading files that may be anything: a pipe would block for ever, a device would never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
