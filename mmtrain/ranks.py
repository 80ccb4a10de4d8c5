"""Which rank this process is, and on which device, from what its launcher left in the environment.

torchrun, DeepSpeed's launcher, Ray's workers and `mmtrain launch` say RANK, WORLD_SIZE and
LOCAL_RANK. Plain `srun` says the same in Slurm's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from mmtrain.errors import LaunchError

_Default = TypeVar("_Default")


@dataclass(frozen=True)
class Place:
    """A process among all ranks, and among those of its host."""

    rank: int
    size: int
    local_rank: int | None  # None: there are several ranks, and nobody said
    local_size: int


def place_of(environment: Mapping[str, str]) -> Place:
    """This process's place; one alone where no launcher said anything."""
    # Only srun says how many tasks its step has. A batch script is a task of no step, though it
    # sees SLURM_NTASKS and a SLURM_PROCID of 0, too.
    in_step = bool(environment.get("SLURM_STEP_NUM_TASKS"))

    def number(*names: str, default: _Default) -> int | _Default:
        asked = [name for name in names if in_step or not name.startswith("SLURM_")]
        given = next((name for name in asked if environment.get(name)), None)
        return default if given is None else _number(given, environment[given])

    size = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
    return Place(
        rank=number("RANK", "SLURM_PROCID", default=0),
        size=size,
        local_rank=number("LOCAL_RANK", "SLURM_LOCALID", default=0 if size == 1 else None),
        # DeepSpeed's launcher says LOCAL_SIZE.
        local_size=number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", default=size),
    )


def device_index(local_rank: int | None, num_visible: int) -> int:
    """The number of the GPU, among those that this process sees, that belongs to a local rank."""
    if num_visible == 1:  # the launcher gave each rank its own, as `srun --gpus-per-task=1` does
        return 0
    if local_rank is None:  # 0 would be every rank's
        raise LaunchError(
            f"LOCAL_RANK is missing: which of the {num_visible} visible GPUs is this rank's own?",
            "Start it with `mmtrain launch` or torchrun, set LOCAL_RANK (0 where a host has one"
            " rank), or show each rank its own GPU only.",
        )
    if local_rank >= num_visible:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: {num_visible} are visible to it.",
            f"Start at most {num_visible} ranks on this host, or show each rank its own GPU only.",
        )
    return local_rank


def refuse_missing_master(place: Place, environment: Mapping[str, str]) -> None:
    """Ranks meet at an address, which srun does not say."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise LaunchError(
            f"rank {place.rank} of {place.size} is not told where rank 0 listens:"
            f" {' and '.join(missing)} missing.",
            "Start it with `mmtrain launch` or torchrun; before a plain srun, export"
            ' MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            " MASTER_PORT=29500.",
        )


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise LaunchError(f"{name}='{value}' is no number.", "Correct it, or unset it.")
    return int(value)
