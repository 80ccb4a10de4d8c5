"""Tuners of the peft library by their names: placed, keyed, validated as everything else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtrain.assemble import Assembled, build_model
from mmtrain.errors import ConfigError
from mmtrain.models import decoding
from mmtrain.models.dropout import scope_of
from mmtrain.models.interface import BatchSize
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from mmtrain.training.export import merged_state

TUNERS: dict[str, dict[str, Any]] = {
    "vera": {"r": 8, "vera_dropout": 0.3},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "hra": {"r": 2},
    "oft": {"oft_block_size": 8, "r": 0},
    "miss": {"r": 8},
    "fourierft": {"n_frequency": 50},
}


def run_of(tuner: str, zero: str = "zero1", **options: Any) -> Any:
    block = {"mode": "peft", "method": "peft_library", "tuner": tuner, **options}
    return resolve(
        {
            "model": {"family": "llava", "preset": "tiny", "dtype": "fp32"},
            "components": {"llm": block | {"sublayers": ["attn"], "layers": "last-2"}},
            "optim": {"global_batch": 2, "micro_batch": 2},
            "parallel": {"deepspeed": zero},
        }
    )


def loss_of(assembled: Assembled) -> torch.Tensor:
    size = BatchSize(samples=2, tokens=40, answer_tokens=6)
    batch = assembled.family.code.planned_batch(assembled.model.config, size)
    return decoding.forward(assembled.family, assembled.model, batch).answer_loss_sum


def values(assembled: Assembled) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in assembled.trained_parameters().items()}


@pytest.mark.parametrize("tuner", TUNERS)
def test_it_goes_where_the_grammar_says_and_is_keyed(tuner: str) -> None:
    config = run_of(tuner, **TUNERS[tuner])
    torch.manual_seed(1)
    first = build_model(config, None)
    first.model.eval()
    torch.manual_seed(2)
    again = build_model(config, None)
    assert set(values(first)) == set(values(again))
    assert all(torch.equal(values(again)[name], one) for name, one in values(first).items())
    assert all(".layers.2." in name or ".layers.3." in name for name in values(first))
    count = sum(one.numel() for one in values(first).values())
    assert examine(config, world_size=1)["peft_params"] == count
    with torch.no_grad():
        for one in first.trained_parameters().values():
            one.add_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0)))
    adapted = loss_of(first)
    adapted.backward()
    assert all(one.grad is not None for one in first.trained_parameters().values())
    base = build_model(resolve(config.model_dump(mode="json") | {"components": {}}), None)
    assert not torch.isclose(loss_of(base), adapted, rtol=1e-5)
    base.model.load_state_dict(merged_state(first.model, first.trainable), strict=False)
    torch.testing.assert_close(loss_of(base), adapted, rtol=1e-4, atol=0)


def test_its_dropout_is_keyed_by_step_and_sample() -> None:
    assembled = build_model(run_of("vera", **TUNERS["vera"]), None)
    with torch.no_grad():
        for name, one in assembled.trained_parameters().items():
            one.fill_(1.0 if "lambda_b" in name else 0.1)
    assembled.model.train()
    scope = scope_of(assembled.model)
    scope.step = 1
    first, again = float(loss_of(assembled)), float(loss_of(assembled))
    scope.step = 2
    assert first == again != float(loss_of(assembled))


@pytest.mark.parametrize(
    ("tuner", "options", "wanted"),
    [
        ("verra", {}, "peft has no tuner 'verra'; did you mean 'vera'"),
        ("loha", {"rr": 2}, "'loha' has no 'rr'; did you mean 'r'"),
        ("adalora", {}, "'adalora' is not run here: it moves ranks"),
        ("prefix_tuning", {}, "peft has no tuner 'prefix_tuning'"),
        ("loha", {"target_modules": "x"}, "'loha' has no 'target_modules'"),
        ("loha", {"r": 2, "rank_dropout": 0.5}, "rank_dropout: 'loha' draws it from torch's own"),
    ],
)
def test_what_is_wrong_is_said(tuner: str, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of(tuner, **options), world_size=1)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs whole base weights, use zero2"):
        run_of("loha", zero="zero3", r=2)
