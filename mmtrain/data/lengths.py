"""How many tokens every sample has, known before training reads it.

Counted once for a folder, a tokenizer, a template and the options that matter, by all ranks
together, and kept outside the shard folder, which may be read-only or shared.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mmtrain import distributed
from mmtrain.data.mixture import Mixed
from mmtrain.files import cache_folder, keep_in_cache, read_regular

_BYTES_PER_SAMPLE = 4
_HEADER_BYTES = 4096  # more than any header of these files


def token_lengths(
    source: Mixed,
    identity: Mapping[str, object],
    world: distributed.World,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """int32, by sample number; `identity` is all that decides how samples become tokens."""
    about = json.dumps({"samples": len(source), **identity}, sort_keys=True)
    path = cache_folder() / "lengths" / f"{hashlib.sha256(about.encode()).hexdigest()}.npy"
    kept = distributed.from_main(_read(path, len(source)) if distributed.is_main() else None)
    if kept is not None:
        return kept
    mine = range(world.rank, len(source), world.size)
    found = []
    for done, index in enumerate(mine, start=1):
        found.append(source.num_tokens(index))
        on_sample(done, len(mine))
    lengths = np.zeros(len(source), dtype=np.int32)
    for rank, part in enumerate(distributed.gather_objects(found)):
        lengths[rank :: world.size] = part
    if distributed.is_main():
        _write(path, lengths)
    return lengths


def _read(path: Path, num_samples: int) -> np.ndarray | None:
    """What was counted before; None where nothing usable is kept."""
    try:
        content = read_regular(path, _HEADER_BYTES + _BYTES_PER_SAMPLE * num_samples)
        lengths = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = lengths.shape == (num_samples,) and lengths.dtype == np.int32
    return lengths if usable and (lengths > 0).all() else None


def _write(path: Path, lengths: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, lengths)
    keep_in_cache(path, content.getvalue())
