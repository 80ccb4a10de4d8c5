"""Host memory while a sharded model is built.

Every parameter is whole for a moment and then only a piece of it stays. glibc keeps freed blocks
of up to 32 MiB for itself, and the pieces that stay between them keep it from giving them back: a
rank could hold the whole model although it keeps one shard.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_MIB = 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


@contextmanager
def returning_freed_memory(active: bool) -> Iterator[None]:
    """Inside, freed tensors go back to the system at once (glibc only; elsewhere: no effect)."""
    if not active:
        yield
        return
    _set_option(_M_MMAP_THRESHOLD, _MIB)
    try:
        yield
    finally:
        # What glibc's own adjustment arrives at in training: fewer system calls.
        _set_option(_M_MMAP_THRESHOLD, 32 * _MIB)
        _set_option(_M_TRIM_THRESHOLD, 64 * _MIB)


def _set_option(option: int, value: int) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(option, value)
