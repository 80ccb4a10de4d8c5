"""What is said of a gradient that must not meet the optimizer."""

from __future__ import annotations

import math

import pytest

from mmtrain.errors import TrainingError
from mmtrain.training.audit import refuse_bad_gradients, refuse_bad_loss

OWNER = {"a.weight": "vision", "b.weight": "llm", "c.weight": "llm"}


@pytest.mark.parametrize(
    ("squared", "named"),
    [
        ({"a.weight": 1.0, "b.weight": math.nan, "c.weight": 2.0}, "llm is"),
        ({"a.weight": math.inf, "b.weight": 1.0, "c.weight": math.nan}, "llm, vision is"),
        # Each is finite, their norm in fp32 is not.
        ({"a.weight": 1e76, "b.weight": 1.0, "c.weight": 2.0}, "vision is"),
    ],
)
def test_the_components_are_named(squared: dict[str, float], named: str) -> None:
    with pytest.raises(TrainingError, match=f"the gradient of {named} NaN or infinite"):
        refuse_bad_gradients(squared, OWNER, [["s1"]])


def test_as_many_samples_are_named_as_a_person_reads() -> None:
    ids = [[f"s{number}" for number in range(20)], [], ["last"]]
    with pytest.raises(TrainingError) as caught:
        refuse_bad_loss(ids)
    assert "rank 0: s0, s1, s2, s3, s4, s5, s6, s7 and 12 more; rank 2: last. No" in str(
        caught.value
    )
