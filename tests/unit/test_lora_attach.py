"""LoRA on the real model: keyed initialisation, several components, gradients under dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mmtrain.config.schema import ComponentConfig
from mmtrain.models import decoding
from mmtrain.models.dropout import scope_of
from mmtrain.peft.interface import Linear, Target
from mmtrain.peft.methods.lora import METHOD, LoraOptions
from mmtrain.peft.trainable import Trainable, make_trainable
from tests.unit.llava_material import FAMILY, load, logits_of, mixed, write_lively

SEED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("llava"))


def block(**values: Any) -> ComponentConfig:
    return ComponentConfig(**{"mode": "peft", "method": "lora", "r": 4, "alpha": 8, **values})


def adapted(folder: Path, **components: ComponentConfig) -> tuple[Any, Any, Trainable]:
    """(loaded model, its processor, what trains)."""
    loaded = load(folder)
    return loaded.model, loaded.processor, make_trainable(loaded.model, FAMILY, components, SEED)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_initialisation_does_not_depend_on_the_order_of_attaching(folder: Path) -> None:
    torch.manual_seed(1)
    first = trained(adapted(folder, llm=block(), vision=block())[0])
    torch.manual_seed(2)
    second = trained(adapted(folder, vision=block(), llm=block())[0])
    alone = trained(adapted(folder, llm=block())[0])
    assert set(first) == set(second) and set(alone) < set(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], alone[name]) for name in alone)


def test_initialisation_is_keyed_by_seed_and_module(folder: Path) -> None:
    weights = trained(adapted(folder, llm=block())[0])
    downs = [value for name, value in weights.items() if ".lora_A." in name and "q_proj" in name]
    assert len(downs) > 1
    assert not any(torch.equal(downs[0], other) for other in downs[1:])
    other = load(folder)
    make_trainable(other.model, FAMILY, {"llm": block()}, SEED + 1)
    name = next(name for name in weights if ".lora_A." in name)
    assert not torch.equal(trained(other.model)[name], weights[name])


def loss_of(model: Any, processor: Any) -> torch.Tensor:
    return decoding.forward(
        FAMILY, model, FAMILY.code.collate(mixed(processor), processor)
    ).answer_loss_sum


def test_starts_at_identity(folder: Path) -> None:
    plain = load(folder)
    model, processor, _ = adapted(folder, llm=block(dropout=0.3), vision=block(dropout=0.3))
    with torch.no_grad():
        assert torch.equal(loss_of(plain.model, processor), loss_of(model.train(), processor))


def set_b(model: Any, value: float, component: str = "") -> None:
    """Every B of a component, or of all, away from the identity or back to it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".lora_B.{component}" in name:
                parameter.fill_(value)


def test_two_components_both_train(folder: Path) -> None:
    model, processor, trainable = adapted(folder, llm=block(dropout=0.1), vision=block(r=2))
    assert {a.component for a in trainable.attachments} == {"llm", "vision"}
    set_b(model, 0.01)
    loss_of(model.train(), processor).backward()
    for name, parameter in model.named_parameters():
        used = parameter.requires_grad and ".encoder.layers.2." not in name  # above layer -2
        assert (parameter.grad is not None and bool(parameter.grad.any())) == used, name


@pytest.mark.parametrize("component", ["llm", "vision"])
def test_two_components_are_both_active(folder: Path, component: str) -> None:
    model, processor, _ = adapted(folder, llm=block(), vision=block(r=2))
    set_b(model, 0.01)
    with torch.no_grad():
        both = float(loss_of(model, processor))
        set_b(model, 0.0, component)
        assert abs(float(loss_of(model, processor)) - both) > 1e-4


def test_masks_follow_the_sample_not_its_place_in_the_batch(folder: Path) -> None:
    model, processor, _ = adapted(folder, llm=block(dropout=0.5), vision=block(dropout=0.5))
    set_b(model, 0.05)
    model.train()
    scope = scope_of(model)
    scope.seed = 3
    examples = mixed(processor)

    def losses(picked: list[int]) -> dict[str, float]:
        batch = FAMILY.code.collate([examples[index] for index in picked], processor)
        with torch.no_grad():
            found = decoding.forward(FAMILY, model, batch).per_sample_loss
        return dict(zip(batch.ids, found.tolist(), strict=True))

    together = losses([0, 1, 2])
    for picked in ([2, 1, 0], [1], [0, 2], [2]):
        for name, value in losses(picked).items():
            assert value == pytest.approx(together[name], rel=1e-5), (picked, name)
    scope.step = 1
    other = losses([0, 1, 2])
    assert all(abs(other[name] - together[name]) > 1e-3 for name in other)


def test_activation_checkpointing_recomputes_with_the_same_masks(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, processor, _ = adapted(folder, llm=block(dropout=0.5), vision=block(dropout=0.5))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss_of(model, processor).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def switch_off(model: nn.Module, trainable: Trainable) -> None:
    for layer in lora_layers(model):
        layer.enable_adapters(False)


def switch_on(model: nn.Module, trainable: Trainable) -> None:
    for layer in lora_layers(model):
        layer.enable_adapters(True)


def merge_all(model: nn.Module, trainable: Trainable) -> None:
    for attachment in trainable.attachments:
        attachment.method.merge(attachment.target)


def unmerge_all(model: nn.Module, trainable: Trainable) -> None:
    for layer in lora_layers(model):
        layer.unmerge()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ([merge_all], "adapted"),
        ([merge_all, unmerge_all], "adapted"),
        ([switch_off], "base"),
        ([switch_off, switch_on], "adapted"),
        # As peft has it: the base's numbers, whatever was merged before.
        ([merge_all, switch_off], "base"),
    ],
    ids=["merged", "unmerged", "off", "off and on", "merged and off"],
)
def test_an_adapter_counts_once_or_not_at_all(
    folder: Path, change: list[Callable[[nn.Module, Trainable], None]], wanted: str
) -> None:
    model, processor, trainable = adapted(folder, llm=block(dropout=0.3), vision=block(r=2))
    model.eval()
    batch = FAMILY.code.collate(mixed(processor), processor)
    with torch.no_grad():
        logits = {"base": logits_of(model, batch)}
        set_b(model, 0.02)
        logits["adapted"] = logits_of(model, batch)
        apart = float((logits["adapted"] - logits["base"]).abs().max())
        for step in change:
            step(model, trainable)
        found = logits_of(model, batch)
    assert apart > 0.1
    assert float((found - logits[wanted]).abs().max()) < 1e-4 * apart


def test_layers_that_read_their_own_output_in_backward_are_adapted_too() -> None:
    class Bounded(nn.Linear):
        """tanh's gradient is computed from its output."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).tanh()

    model = nn.Sequential(Bounded(4, 4))
    target = Target("llm", model, linears=(Linear("0", "mlp", "up", None, (4, 4)),), pattern="0")
    METHOD.attach(target, LoraOptions(r=2, alpha=2, dropout=0), SEED)
    x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    model(x).sum().backward()
    bounded = model[0].base_layer
    wanted = (1 - bounded(x).square()) @ bounded.weight
    torch.testing.assert_close(x.grad, wanted)
