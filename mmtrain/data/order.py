"""The order of samples as a pure function: no generator, no library whose stream may change.

A sample's place in an epoch depends on (seed, epoch, index) alone, so any rank, at any world size
and after any restart, finds the same order without replaying what came before.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_MASK_64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    """The output function of splitmix64. Arrays only: numpy wraps them without a warning."""
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


def keyed_hash(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """One uint64 per index: the splitmix64 stream whose start is mixed from seed and epoch."""
    start = _mix(np.array([seed & _MASK_64], dtype=np.uint64) + _GOLDEN)
    start = _mix(start + np.array([epoch & _MASK_64], dtype=np.uint64) * _GOLDEN + _GOLDEN)
    counters = indices.astype(np.uint64) + np.uint64(1)
    return _mix(start + counters * _GOLDEN)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_samples) as int64: every index once, the same on every rank."""
    hashes = keyed_hash(seed, epoch, np.arange(num_samples))
    return np.argsort(hashes, kind="stable").astype(np.int64)


def sample_key(sample_id: str) -> int:
    """A stable 63-bit hash of a sample id: keys its dropout masks on any split of the batch."""
    digest = blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
