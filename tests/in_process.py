"""Training in the test's own process, as a group of one rank."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmtrain import distributed

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one inside; environment and torch's switches as before outside.

    The group itself stays: DeepSpeed keeps groups it has seen and cannot live through another.
    """
    environment, threads = dict(os.environ), torch.get_num_threads()
    for name in ALONE:
        os.environ.pop(name, None)
    try:
        distributed.initialise()
        os.environ.update(ALONE)
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def train(run: Mapping[str, Any], on_validation: Any = None) -> dict[str, float]:
    """Train a run given as data."""
    from mmtrain.resolve import resolve
    from mmtrain.training.run import run_training

    return run_training(resolve(run), on_validation)


def trained_digest(run_dir: Path) -> str:
    """sha256 over the exported adapter and the component trained in full."""
    files = ("adapter/adapter_model.safetensors", "full/connector.safetensors")
    return hashlib.sha256(b"".join((run_dir / name).read_bytes() for name in files)).hexdigest()
