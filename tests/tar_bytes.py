"""Tar bytes of named members, for shards that no writer of ours would write."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence

from mmtrain.data.tar import Member

END_MARK = bytes(1024)


def pack(members: Sequence[Member]) -> bytes:
    """Headers and contents, block by block, without an end mark."""
    parts = []
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % 512)]
    return b"".join(parts)
