"""Threads, precision and determinism of the kernels: the same file computes the same numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmtrain.config.schema import RunConfig
from mmtrain.errors import LaunchError, TrainingError
from mmtrain.ranks import place_of

# cuBLAS repeats itself only with one of these.
_WORKSPACES = (":4096:8", ":16:8")
_NO_DETERMINISTIC_VERSION = re.compile(r"(\S+) does not have a deterministic implementation")


def pin_numerics(config: RunConfig) -> None:
    """To be called before anything is computed: cuBLAS looks at its environment only once."""
    cores = len(os.sched_getaffinity(0))
    threads = config.parallel.threads or max(1, cores // place_of(os.environ).local_size)
    torch.set_num_threads(threads)
    _keep_fp32_whole()
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        _set_workspace()
        # FlashAttention's own package does not know torch's switch.
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        # Nothing here reads memory it has not written; filling DeepSpeed's communication buckets
        # took more than half of a small step.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def _keep_fp32_whole() -> None:
    """fp32 means fp32: Ampere's convolutions would round to TF32, in some containers all would."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _set_workspace() -> None:
    found = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if found not in _WORKSPACES:
        raise LaunchError(
            f"CUBLAS_WORKSPACE_CONFIG={found} makes cuBLAS differ from run to run, but the run file"
            " says deterministic: true.",
            f"Unset it, set it to {_WORKSPACES[0]}, or set deterministic: false.",
        )


@contextmanager
def nondeterminism_explained() -> Iterator[None]:
    """torch's refusal to compute what it cannot repeat, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        found = _NO_DETERMINISTIC_VERSION.search(str(error))
        if found is None:
            raise
        raise TrainingError(
            f"deterministic: true, but torch computes {found[1]} differently from run to run on"
            " this device.",
            "Set deterministic: false; repeats and resumes are then no longer bit-equal.",
        ) from error
