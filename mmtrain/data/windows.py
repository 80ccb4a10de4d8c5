"""The order of an epoch whose data exceed the cache: window after window of whole shards.

Which shards a window holds is a function of (the manifests' sizes, the cache's size, seed, epoch)
alone, so neither a resume nor another number of ranks changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from mmtrain.data.cache import GIB
from mmtrain.data.manifest import Manifest, ShardInfo
from mmtrain.data.order import keyed_hash
from mmtrain.errors import ConfigError

# Keys the order of shards: neither an epoch's own key nor that of a set of a mix.
_OWN_KEY = 2**32 - 1


@dataclass(frozen=True)
class Share:
    """What a run reads of a shard folder: its first samples."""

    manifest: Manifest
    num_samples: int
    remote: bool

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Those that hold the samples."""
        counts = np.cumsum([shard.samples for shard in self.manifest.shards])
        return self.manifest.shards[: int(np.searchsorted(counts, self.num_samples)) + 1]

    @property
    def num_bytes(self) -> int:
        """To be fetched; none of a folder on this machine."""
        return sum(shard.bytes for shard in self.shards) if self.remote else 0

    @property
    def shard_of(self) -> np.ndarray:
        """The number of the shard of every sample."""
        counts = [shard.samples for shard in self.shards]
        return np.repeat(np.arange(len(counts)), counts)[: self.num_samples]


@dataclass(frozen=True, eq=False)
class Windows:
    """What comes and goes as one, and how much of it lies in the cache at a time."""

    unit: np.ndarray  # of every sample, numbered through all sets
    num_bytes: np.ndarray  # of every unit; zero for a single sample that is always at hand
    most: int  # bytes of a window

    def of(self, seed: int, epoch: int) -> np.ndarray:
        """The window of every sample in an epoch."""
        return _windows(self, seed, epoch)[self.unit]

    @property
    def digest(self) -> str:
        """Names the cut, which a resume must find again."""
        cut = self.unit.tobytes() + self.num_bytes.tobytes() + b"%d" % self.most
        return sha256(cut).hexdigest()


# Kept for this epoch and the next: it is asked for at every step.
@lru_cache(maxsize=2)
def _windows(windows: Windows, seed: int, epoch: int) -> np.ndarray:
    """Units in a keyed order, cut where a window is full; what is at hand is dealt out evenly."""
    hashes = keyed_hash((seed << 32) + _OWN_KEY, epoch, np.arange(len(windows.num_bytes)))
    order = np.argsort(hashes, kind="stable")
    moving, at_hand = (order[(windows.num_bytes[order] > 0) == moves] for moves in (True, False))
    ends = np.cumsum(windows.num_bytes[moving])
    found = np.empty(len(order), dtype=np.int64)
    full: list[int] = []  # bytes up to the end of each window
    start = 0
    while start < len(moving):
        done = full[-1] if full else 0
        stop = int(np.searchsorted(ends, done + windows.most, side="right"))
        found[moving[start:stop]] = len(full)
        full.append(int(ends[stop - 1]))
        start = stop
    places = (np.arange(len(at_hand)) + 0.5) / max(1, len(at_hand)) * full[-1]
    found[at_hand] = np.searchsorted(full, places, side="right")
    return found


def windows_for(train: Sequence[Share], val: Sequence[Share], max_bytes: int) -> Windows | None:
    """How the training sets move through a cache; None where everything stays in it.

    Validation sets stay, and the smallest training sets while they leave half of the cache: their
    samples then come in every window. Of the rest a window is half, as the next one is fetched
    while one trains.
    """
    kept = sum(share.num_bytes for share in val)
    remote = sorted((share for share in train if share.remote), key=lambda share: share.num_bytes)
    if kept + sum(share.num_bytes for share in remote) <= max_bytes:
        return None
    largest = max((shard.bytes for share in remote for shard in share.shards), default=0)
    may_stay = min(max_bytes // 2, max_bytes - 2 * largest)
    while remote and kept + remote[0].num_bytes <= may_stay:
        kept += remote.pop(0).num_bytes
    most = (max_bytes - kept) // 2
    if most < largest or kept > max_bytes:
        raise ConfigError(
            [
                f"data.cache_gib: {max_bytes / GIB:.4g} GiB are too few for"
                f" {kept / GIB:.4g} GiB that stay (validation, small sets) and twice the largest"
                f" shard; give at least {(kept + 2 * largest) / GIB:.4g}"
            ]
        )
    return _cut(train, {id(share) for share in remote}, most)


def _cut(train: Sequence[Share], moving: set[int], most: int) -> Windows:
    units, sizes, start = [], [], 0
    for share in train:
        if id(share) in moving:
            unit, bytes_of = share.shard_of, [shard.bytes for shard in share.shards]
        else:
            unit, bytes_of = np.arange(share.num_samples), [0] * share.num_samples
        units.append(start + unit)
        sizes.append(np.array(bytes_of, dtype=np.int64))
        start += len(bytes_of)
    return Windows(np.concatenate(units), np.concatenate(sizes), most)
