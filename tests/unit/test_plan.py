"""Step plans: the same samples however they are cut, bins of like lengths, ranks in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.data.plan import PADDING, Layout, Planner, StepPlan

SEED, GLOBAL_BATCH = 3, 32


def lengths_of(num_samples: int, longest: int = 700) -> np.ndarray:
    """As of ScienceQA: half without an image, which is 576 tokens."""
    drawn = np.random.default_rng(0).integers(20, longest - 576, num_samples)
    return (drawn + 576 * (np.arange(num_samples) % 2)).astype(np.int32)


def samples_of(plan: StepPlan) -> list[int]:
    return [i for step in plan.bins for one in step for i in one if i != PADDING]


def padded_tokens(plan: StepPlan, lengths: np.ndarray) -> int:
    bins = [[i for i in one if i != PADDING] for step in plan.bins for one in step]
    return sum(len(one) * int(lengths[one].max()) for one in bins if one)


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 90),
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 8]),
    micro_tokens=st.none() | st.integers(1, 4000),
)
def test_every_cut_sees_the_same_samples(
    num_samples: int, world: int, micro: int, micro_tokens: int | None
) -> None:
    lengths = lengths_of(num_samples)
    in_order = Planner(num_samples, Layout(1, 0, GLOBAL_BATCH, GLOBAL_BATCH), SEED)
    layout = Layout(world, 0, micro, GLOBAL_BATCH, micro_tokens)
    balanced = Planner(num_samples, layout, SEED, lengths)
    assert balanced.steps_per_epoch == in_order.steps_per_epoch
    for position in range(2 * in_order.steps_per_epoch):
        plan, wanted = balanced.plan(position), in_order.plan(position)
        assert sorted(samples_of(plan)) == sorted(samples_of(wanted))
        assert plan.epoch == wanted.epoch and plan.num_samples == wanted.num_samples
        # Every rank makes the same number of forwards, none of them of nothing.
        assert {len(step) for step in plan.bins} == {world}
        assert all(one for step in plan.bins for one in step)
        if micro_tokens is None:
            assert {len(one) for step in plan.bins for one in step} == {micro}
        else:
            for one in (one for step in plan.bins for one in step):
                longest = max((int(lengths[i]) for i in one if i != PADDING), default=0)
                assert len(one) == 1 or len(one) * longest <= micro_tokens


def test_balanced_bins_hold_little_padding() -> None:
    lengths = lengths_of(3200)
    layout = Layout(2, 0, 4, GLOBAL_BATCH)
    plans = {
        name: [Planner(3200, layout, SEED, known).plan(position) for position in range(100)]
        for name, known in (("order", None), ("balanced", lengths))
    }
    real = sum(int(lengths[samples_of(plan)].sum()) for plan in plans["order"])
    share = {
        name: 1 - real / sum(padded_tokens(plan, lengths) for plan in made)
        for name, made in plans.items()
    }
    assert share["order"] > 0.3 and share["balanced"] < 0.1, share


def test_ranks_wait_little_for_each_other() -> None:
    """A micro-step takes as long as its longest bin: beside what an even deal would take."""
    lengths = lengths_of(3200)
    waits = {}
    for name, known in (("order", None), ("balanced", lengths)):
        planner = Planner(3200, Layout(2, 0, 4, GLOBAL_BATCH), SEED, known)
        plans = [planner.plan(position) for position in range(100)]
        steps = [
            [sum(int(lengths[i]) for i in one) for one in step]
            for plan in plans
            for step in plan.bins
        ]
        waits[name] = sum(map(max, steps)) / (sum(map(sum, steps)) / 2) - 1
    assert waits["order"] > 0.2 and waits["balanced"] < 0.14, waits


@pytest.mark.parametrize("micro_tokens", [None, 1500])
def test_a_plan_is_a_function_of_its_position(micro_tokens: int | None) -> None:
    layout = Layout(2, 0, 4, GLOBAL_BATCH, micro_tokens)
    one, other = (Planner(100, layout, SEED, lengths_of(100)) for _ in range(2))
    assert [one.plan(n) for n in range(8)] == [other.plan(n) for n in reversed(range(8))][::-1]
