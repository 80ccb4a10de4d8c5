"""The stream: one order for every split, padding without weight, and a cursor that is a number."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.data.order import epoch_order
from mmtrain.data.plan import PADDING, Layout, Planner
from mmtrain.data.stream import StepBatches, StepStream, equal_chunks
from mmtrain.errors import ConfigError, DataError
from mmtrain.models.interface import Batch, Example

SEED, NUM_SAMPLES, GLOBAL_BATCH = 5, 21, 8
SPLITS = [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (8, 1)]


def collate(examples: Sequence[Example]) -> Batch:
    weights = torch.tensor([example.weight for example in examples])
    counted = int((weights > 0).sum())
    return Batch({"weights": weights}, [example.id for example in examples], counted, counted)


def make_example(index: int) -> Example:
    return Example(str(index), index, [1, 2], [-100, 2])


def stream(world: int = 1, rank: int = 0, micro: int = 4, **changed: Any) -> StepStream:
    layout = Layout(world, rank, micro, GLOBAL_BATCH)
    plan = Planner(changed.pop("num_samples", NUM_SAMPLES), layout, changed.pop("seed", SEED))
    return StepStream(plan, collate=collate, **{"example": make_example, "workers": 0, **changed})


def plan_step(position: int, num_samples: int, global_batch: int, seed: int) -> tuple[int, Any]:
    """Epoch and samples of a step, in order."""
    plan = Planner(num_samples, Layout(1, 0, global_batch, global_batch), seed).plan(position)
    return plan.epoch, np.array(plan.bins[0][0])


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    return Planner(num_samples, Layout(1, 0, 1, global_batch), SEED).steps_per_epoch


BAD = {0, 3, 4}


def damaged(index: int) -> Example:
    if index in BAD:
        raise DataError(f"sample '{index}' is damaged;", "copy it again.")
    return make_example(index)


def test_bad_samples_are_left_out_named_and_counted_on_every_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is left of a step stays what it was, and what fills it up counts for nothing."""
    for world, micro in SPLITS:
        steps = [
            [stream(world, rank, micro, example=damaged, skips_bad=True).step(n) for n in range(3)]
            for rank in range(world)
        ]
        wanted = stream(1, 0, GLOBAL_BATCH)
        for number in range(3):
            found = sorted(index for rank in steps for index in seen(rank[number]) if index >= 0)
            whole = sorted(index for index in seen(wanted.step(number)) if index >= 0)
            assert found == [index for index in whole if index not in BAD]
        assert sum(one.num_bad for rank in steps for one in rank) == len(BAD)
    assert "left out of training: sample '3' is damaged; copy it again." in caplog.text
    with pytest.raises(DataError, match="damaged"):
        list(stream(example=damaged).steps(0, 3))


def seen(step: StepBatches) -> list[int]:
    """The samples of a step on one rank, padding as PADDING."""
    found = []
    for batch in step.micro_batches:
        weights = batch.tensors["weights"].tolist()
        found += [
            int(name) if weight else PADDING
            for name, weight in zip(batch.ids, weights, strict=True)
        ]
    return found


def test_who_ends_a_run_does_not_wait_for_what_is_on_its_way() -> None:
    arrived = threading.Event()

    def example(index: int) -> Example:
        if index not in first:
            assert arrived.wait(60)
        return make_example(index)

    first = set(plan_step(0, NUM_SAMPLES, GLOBAL_BATCH, SEED)[1].tolist())
    steps = stream(example=example, workers=2).steps(0, 3)
    next(steps)
    steps.close()
    assert not arrived.is_set()
    arrived.set()


@pytest.mark.parametrize(("world", "micro"), SPLITS)
def test_every_split_sees_the_plan(world: int, micro: int) -> None:
    ranks = [list(stream(world, rank, micro).steps(0, 7)) for rank in range(world)]
    for position in range(7):
        epoch, plan = plan_step(position, NUM_SAMPLES, GLOBAL_BATCH, SEED)
        steps = [rank[position] for rank in ranks]
        union = [index for step in steps for index in seen(step)]
        assert sorted(union) == sorted(plan.tolist())
        assert {step.position for step in steps} == {position}
        assert epoch == position // steps_per_epoch(NUM_SAMPLES, GLOBAL_BATCH)
        # Every rank makes the same number of calls of the same size.
        calls = {tuple(len(batch.ids) for batch in step.micro_batches) for step in steps}
        assert calls == {(micro,) * (GLOBAL_BATCH // (world * micro))}
        # Put together in order, micro-step by micro-step, the ranks give the plan itself.
        ordered = []
        for number in range(len(steps[0].micro_batches)):
            for step in steps:
                one = StepBatches(0, [step.micro_batches[number]], 0)
                ordered += seen(one)
        assert ordered == plan.tolist()


@pytest.mark.parametrize(
    ("num_samples", "wanted"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)]
)
def test_an_epoch_has_every_sample_once(num_samples: int, wanted: int) -> None:
    assert steps_per_epoch(num_samples, GLOBAL_BATCH) == wanted
    one = stream(num_samples=num_samples)
    assert one.planner.steps_per_epoch == wanted
    for epoch in range(2):
        steps = list(one.steps(epoch * wanted, (epoch + 1) * wanted))
        indices = [index for step in steps for index in seen(step)]
        real = [index for index in indices if index != PADDING]
        assert real == epoch_order(num_samples, SEED, epoch).tolist()
        assert indices == real + [PADDING] * (wanted * GLOBAL_BATCH - num_samples)
        assert sum(step.num_samples for step in steps) == num_samples


def test_seeds_and_epochs_give_other_orders() -> None:
    plans = [
        tuple(plan_step(position, 64, 64, seed)[1]) for position in range(2) for seed in range(2)
    ]
    assert len(set(plans)) == 4


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_change_nothing(workers: int) -> None:
    def slow(index: int) -> Example:
        time.sleep(0.0005 * (index % 4))  # later steps finish before earlier ones
        return make_example(index)

    plain = list(stream(micro=2).steps(0, 9))
    threaded = list(stream(micro=2, example=slow, workers=workers).steps(0, 9))
    assert [seen(step) for step in threaded] == [seen(step) for step in plain]
    assert [step.position for step in threaded] == list(range(9))


@pytest.mark.parametrize("start", [0, 1, 3, 8])
def test_a_position_is_all_a_resume_needs(start: int) -> None:
    fresh = list(stream(workers=2).steps(0, 9))[start:]
    resumed = list(stream(workers=2).steps(start, 9))
    assert [seen(step) for step in resumed] == [seen(step) for step in fresh]


def test_a_resume_reads_nothing_of_what_came_before() -> None:
    read: list[int] = []

    def example(index: int) -> Example:
        read.append(index)
        return make_example(index)

    far = stream(num_samples=100_000, example=example)
    far.step(10**6)
    assert len(read) == GLOBAL_BATCH
    assert plan_step(10**6, 100_000, GLOBAL_BATCH, SEED)[0] == 10**6 // 12_500


def test_steps_are_cheap_in_large_sets() -> None:
    """The order of an epoch is computed once, not at every step."""
    large = stream(num_samples=1_000_000)
    large.step(0)
    began_s = time.process_time()
    for position in range(1, 101):
        large.step(position)
    assert (time.process_time() - began_s) / 100 < 0.01


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_raised_where_training_is(workers: int) -> None:
    def example(index: int) -> Example:
        if index == 3:
            raise ValueError("sample 3 is bad")
        return make_example(index)

    with pytest.raises(ValueError, match="sample 3 is bad"):
        list(stream(example=example, workers=workers).steps(0, 3))


def test_a_batch_that_does_not_divide_is_an_error_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="8 is no multiple of micro_batch 3 x 2 ranks; try"):
        Layout(2, 0, 3, GLOBAL_BATCH).check()


@pytest.mark.parametrize("num_samples", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (3, 2)])
def test_equal_chunks_cover_all_once(num_samples: int, world: int, size: int) -> None:
    per_rank = [equal_chunks(num_samples, rank, world, size) for rank in range(world)]
    assert len({len(chunks) for chunks in per_rank}) == 1
    assert {len(chunk) for chunks in per_rank for chunk in chunks} == {size}
    found = [index for chunks in per_rank for chunk in chunks for index in chunk]
    assert sorted(index for index in found if index != PADDING) == list(range(num_samples))
