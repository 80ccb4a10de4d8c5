"""PETAL as published: its counts, its arithmetic, what its estimators know, whom a sample sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mmtrain.assemble import Assembled, build_model
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import Batch, BatchSize
from mmtrain.peft.information import ClubBound, ContrastiveBound
from mmtrain.peft.petal import GatedExperts, SharedModes, owners, weighted_by_score
from mmtrain.planning.census import adapted
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from tests.soaks import cases

SIZE = BatchSize(samples=3, tokens=40, answer_tokens=4)
PAPER_COUNT = 1_056_768
# What the paper's count leaves out: a weight per rank and projection, thresholds, the gate.
WEIGHTS, THRESHOLDS, GATE = 18 * 3 * 64, 18 * 3, 2 * 768
# Counted by the release: factors, weights, copies and experts; its copies behind cross-attention
# reach no output, and are left out.
RELEASE_COUNT, NEVER_READ = 1_396_992, 12 * 2 * 768


def run_of(preset: str = "tiny", **options: Any) -> RunConfig:
    block = {"mode": "peft", "method": "petal", **options}
    model = {"family": "instructblip", "preset": preset, "dtype": "fp32"}
    optim = {"global_batch": SIZE.samples, "micro_batch": SIZE.samples}
    return resolve({"model": model, "components": {"qformer": block}, "optim": optim})


def trained_of(**options: Any) -> int:
    found = adapted(run_of("instructblip-flan-t5-xl", **options)).components
    return found["qformer"].trainable_params


COUNTS: dict[str, tuple[dict[str, Any], int]] = {
    "factors": (
        {"instruction": "plain", "information": 0, "threshold": False},
        PAPER_COUNT - 768 * 64 * 2 * 3 + WEIGHTS,
    ),
    "V2 and V4": ({"information": 0, "threshold": False}, PAPER_COUNT + WEIGHTS + GATE),
    "V2": ({"information": 0}, PAPER_COUNT + WEIGHTS + GATE + THRESHOLDS),
    "six experts": (
        {"information": 0, "experts": 6},
        PAPER_COUNT + 768 * 64 * 6 + WEIGHTS + GATE + THRESHOLDS,
    ),
    "release": ({"variant": "release"}, RELEASE_COUNT - NEVER_READ),
}


@pytest.mark.parametrize("row", cases(["V2", "release"], list(COUNTS)))
def test_counts_are_the_published_ones(row: str) -> None:
    options, wanted = COUNTS[row]
    assert trained_of(**options) == wanted


def test_modes_are_a_tucker_product() -> None:
    torch.manual_seed(0)
    modes = SharedModes(inputs=7, outputs=5, rank=3)
    nn.init.normal_(modes.core)
    x, weights = torch.randn(2, 4, 7), torch.randn(3)
    delta = torch.einsum("oj,ijk,k,in->on", modes.up.weight, modes.core, weights, modes.down.weight)
    torch.testing.assert_close(modes(x, weights), x @ delta.T)


def test_gates_sum_to_one_and_experts_start_as_nothing() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(width=6, size=4, count=3)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6)
    more = torch.randn(2, 5, 3, 6)
    gates = experts.gates(x, more)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5))
    assert gates.std() > 0.1
    nn.init.zeros_(experts.up)
    assert torch.equal(experts(x), x)


def test_queries_are_weighted_by_what_attends_to_them() -> None:
    queries = torch.zeros(1, 3, 2)
    queries[0, 0] = 8.0  # to which only itself attends, wholly; the others look everywhere
    (found,) = weighted_by_score(queries)
    torch.testing.assert_close(found, torch.full((2,), 8.0 * (1 + 2 / 3) / 3))


def gaussians(correlation: float, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    z, noise = torch.randn(2, rows, width)
    return z, correlation * z + math.sqrt(1 - correlation**2) * noise


def fit(model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def initialised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.kaiming_uniform_(parameter)
    return model


@pytest.mark.parametrize("correlation", [0.3, 0.75])
def test_estimators_lie_on_their_side_of_what_is_known(correlation: float) -> None:
    """Of Gaussians, both trained by their own losses alone."""
    torch.manual_seed(0)
    width, rows = 2, 256
    known = -0.5 * width * math.log(1 - correlation**2)
    lower = initialised(ContrastiveBound(width, width, 32))
    upper = initialised(ClubBound(width, width, 32))
    ones = torch.ones(rows)
    fit(lower, lambda: -lower(*gaussians(correlation, width, rows), ones))
    fit(upper, lambda: upper(*gaussians(correlation, width, rows), ones)[1])
    with torch.no_grad():
        z, x = gaussians(correlation, width, 2000)
        ones = torch.ones(len(z))
        found_lower, (found_upper, _) = float(lower(z, x, ones)), upper(z, x, ones)
    slack = 0.05
    assert 0.5 * known - slack < found_lower < known + slack, (found_lower, known)
    assert known - slack < float(found_upper) < 3 * known + slack, (float(found_upper), known)


def test_the_upper_bound_teaches_z_and_its_misfit_the_model() -> None:
    torch.manual_seed(0)
    bound = initialised(ClubBound(2, 3, 4))
    z = torch.randn(5, 2, requires_grad=True)
    value, misfit = bound(z, torch.randn(5, 3), torch.ones(5))
    value.backward()
    assert z.grad is not None and all(p.grad is None for p in bound.parameters())
    z.grad = None
    misfit.backward()
    assert z.grad is None and all(p.grad is not None for p in bound.parameters())


def test_rows_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    lower, upper = initialised(ContrastiveBound(2, 3, 4)), initialised(ClubBound(2, 3, 4))
    z, x = torch.randn(5, 2), torch.randn(5, 3)
    counts = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    kept = counts.bool()
    torch.testing.assert_close(lower(z, x, counts), lower(z[kept], x[kept], torch.ones(3)))
    for found, wanted in zip(upper(z, x, counts), upper(z[kept], x[kept], torch.ones(3))):
        torch.testing.assert_close(found, wanted)
    assert float(lower(z, x, torch.zeros(5))) == 0 == float(upper(z, x, torch.zeros(5))[0])


def assembled_of(**options: Any) -> Assembled:
    found = build_model(run_of(rank=4, size=4, **options), None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.trained_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return found


def batch_of(assembled: Assembled) -> Batch:
    batch = assembled.family.code.planned_batch(assembled.model.config, SIZE)
    torch.manual_seed(2)
    pictures = batch.tensors["pixel_values"]
    batch.tensors["pixel_values"] = torch.randn_like(pictures)
    return batch


def test_images_belong_to_samples() -> None:
    is_image = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    wanted = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1]])
    assert torch.equal(owners(is_image, images=3, tokens=2), wanted)
    blank = torch.zeros(2, 4).bool()
    assert torch.equal(owners(blank, images=1, tokens=2), torch.zeros(1, 2))


@pytest.mark.parametrize(("variant", "sees_mates"), [("paper", False), ("release", True)])
def test_whom_a_sample_sees(variant: str, sees_mates: bool) -> None:
    assembled = assembled_of(variant=variant)
    (attachment,) = assembled.trainable.attachments
    assert attachment.added.batch_coupled
    losses = []
    for last in (1.0, -3.0):
        batch = batch_of(assembled)
        batch.tensors["pixel_values"][-1] *= last
        with torch.no_grad():
            found = decoding.forward(assembled.family, assembled.model, batch)
        losses.append(found.per_sample_loss)
    assert losses[0][-1] != losses[1][-1]
    assert torch.equal(losses[0][:-1], losses[1][:-1]) != sees_mates


def test_auxiliary_losses_are_those_of_this_forward() -> None:
    assembled = assembled_of(information=0.5)
    batch = batch_of(assembled)
    family, model = assembled.family, assembled.model
    found = decoding.forward(family, model, batch)
    assert set(found.auxiliary) == {"petal_information", "petal_misfit"}
    assert all(bool(value != 0) for value in found.auxiliary.values())
    # Features that are there already bring no news of the picture.
    features = family.code.image_features(model, batch)
    model_heard = assembled.trainable.attachments[0].target.model.get_submodule(
        "petal_qformer.information"
    )
    model_heard._heard.clear()
    again = decoding.forward(family, model, batch, features)
    assert all(float(value) == 0 for value in again.auxiliary.values())
    torch.testing.assert_close(again.per_sample_loss, found.per_sample_loss)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"variant": "release", "threshold": False}, "threshold: only variant 'paper' has it"),
        ({"sublayers": {"self_attn": ["q"], "ffn": ["up"]}}, "ffn.up has another shape"),
        ({"experts": 7}, "experts"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_does_not_fit_is_an_error(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of(**options), world_size=1)


def test_it_goes_on_a_qformer_alone() -> None:
    run = {"model": {"family": "llava", "preset": "tiny"}}
    block = {"mode": "peft", "method": "petal"}
    with pytest.raises(ConfigError, match="llm.method: 'petal' tunes the Q-Former"):
        resolve(run | {"components": {"llm": block}})


@pytest.mark.parametrize(
    ("options", "coupled", "identity"),
    [
        ({"instruction": "plain"}, True, True),  # V1
        ({"information": 0}, False, True),  # V2
        ({"instruction": "plain", "information": 0}, False, True),  # V3
        ({"threshold": False}, True, True),  # V4
        ({"instruction": "random"}, True, False),
    ],
    ids=["V1", "V2", "V3", "V4", "random instruction"],
)
def test_ablations_are_options(options: dict[str, Any], coupled: bool, identity: bool) -> None:
    assembled = build_model(run_of(**options), None)
    (attachment,) = assembled.trainable.attachments
    assert attachment.added.batch_coupled == coupled
    assert attachment.added.starts_at_identity == identity
