"""Whatever started this process: which rank it is, and which device is its own."""

from __future__ import annotations

import pytest

from mmtrain.errors import LaunchError
from mmtrain.ranks import Place, device_index, place_of, refuse_missing_master

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Place(3, 4, 1, 2)),
        (SRUN, Place(5, 8, 1, 4)),
        (SRUN | TORCHRUN, Place(3, 4, 1, 2)),
        (SRUN | {"RANK": "5", "WORLD_SIZE": "8"}, Place(5, 8, 1, 4)),
        (SRUN | {"SLURM_NTASKS_PER_NODE": ""}, Place(5, 8, 1, 8)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, None, 4)),
        (BATCH_SCRIPT | {"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, None, 4)),
        (BATCH_SCRIPT, Place(0, 1, 0, 1)),
        (BATCH_SCRIPT | {"SLURM_NTASKS_PER_NODE": "8"}, Place(0, 1, 0, 1)),
    ],
)
def test_place_of_every_launcher(environment: dict[str, str], place: Place) -> None:
    assert place_of(environment) == place


def test_a_rank_that_is_no_number_is_an_error_that_shows_it() -> None:
    with pytest.raises(LaunchError, match="RANK='-1' is no number"):
        place_of({"RANK": "-1"})


def test_ranks_that_do_not_know_where_to_meet_are_told_how() -> None:
    place = place_of(SRUN)
    with pytest.raises(LaunchError, match="rank 5 of 8 .* MASTER_ADDR and MASTER_PORT missing"):
        refuse_missing_master(place, SRUN)
    refuse_missing_master(place, SRUN | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})


def test_a_rank_that_sees_one_gpu_owns_it() -> None:
    """Tasks of `srun --gpus-per-task=1` do, whichever they are on their host."""
    places = [place_of(SRUN | {"SLURM_LOCALID": str(number)}) for number in range(8)]
    assert [place.local_rank for place in places] == list(range(8))
    assert {device_index(place.local_rank, 1) for place in places} == {0}


def test_ranks_that_nobody_tells_apart_do_not_share_a_gpu_in_silence() -> None:
    place = place_of({"RANK": "3", "WORLD_SIZE": "4"})
    with pytest.raises(LaunchError, match="LOCAL_RANK is missing: which of the 8 .* set LOCAL_"):
        device_index(place.local_rank, 8)
    assert device_index(place.local_rank, 1) == 0
    assert device_index(place_of({"RANK": "0", "WORLD_SIZE": "1"}).local_rank, 8) == 0


def test_ranks_that_see_all_gpus_share_them_out() -> None:
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]


def test_more_ranks_than_gpus_is_an_error_that_counts_them() -> None:
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: 2 are visible"):
        device_index(2, 2)
    with pytest.raises(LaunchError, match="local rank 0 has no GPU: 0 are visible"):
        device_index(0, 0)
