"""Freeze everything, attach what the run file asks for, and prove that exactly that trains."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtrain import plugins
from mmtrain.config.schema import ComponentConfig, component_and_label
from mmtrain.errors import ConfigError
from mmtrain.models.interface import Family
from mmtrain.models.quantization import whole_shape
from mmtrain.models.weights import FRESH
from mmtrain.peft.interface import Added, Linear, Method, Target
from mmtrain.peft.placement import chosen_blocks, component_of, select, select_parameters

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Attachment:
    """One method on one component, and what it added."""

    method_name: str
    method: Method
    options: Any
    target: Target
    added: Added

    @property
    def component(self) -> str:
        """Where it sits."""
        return self.target.component

    @property
    def block_name(self) -> str:
        """Its block in the run file."""
        return self.target.block_name

    @property
    def notes(self) -> list[str]:
        """What a user should know before training."""
        coupled = "couples the samples of a batch: how it is split changes results"
        known = {
            "does not start at the base": self.added.starts_at_identity is False,
            "starts where its tuner says": self.added.starts_at_identity is None,
            coupled: self.added.batch_coupled,
            "cannot be merged": not self.method.merges,
        }
        return [note for note, holds in known.items() if holds]

    @property
    def new_parameters(self) -> set[str]:
        """What trains and is none of the base's."""
        return set(self.added.trained) - set(self.target.parameters)

    def exported(self, names: Iterable[str]) -> dict[str, str]:
        """Key in the adapter's file -> name here."""
        return {self.method.export_name(name, self.target): name for name in names}


@dataclass(frozen=True)
class Trainable:
    """What trains: every parameter's block of the run file, and how adapters were attached."""

    owner: dict[str, str]
    attachments: tuple[Attachment, ...]
    full_components: tuple[str, ...]

    @property
    def auxiliary(self) -> dict[str, float]:
        """Further losses of all methods, by name, with their weights."""
        return {k: v for one in self.attachments for k, v in one.added.auxiliary.items()}

    def folder_of(self, attachment: Attachment) -> str:
        """Where an adapter is exported, in the run's folder."""
        return "adapter" if len(self.attachments) == 1 else f"adapter/{attachment.target.adapter}"

    def full_parameters(self, component: str) -> list[str]:
        """The trained base parameters of a component that is trained in full."""
        return [name for name, owner in self.owner.items() if owner == component]


def make_trainable(
    model: nn.Module, family: Family, components: Mapping[str, ComponentConfig], seed: int
) -> Trainable:
    """Attach every method and set `requires_grad`, for exactly the declared parameters."""
    base = dict(model.named_parameters())
    declared: dict[str, str] = {}
    for component, block in components.items():
        if block.mode == "full":
            names = select_parameters(family, component, block, base)
            declared.update(dict.fromkeys(names, component))
    # Every target is found in the base, before any method changes its module tree.
    targets = {
        block_name: _target(model, family, block_name, block)
        for block_name, block in components.items()
        if block.mode == "peft"
    }
    _refuse_shared_modules(targets, components)
    attachments = _attach_all(targets, components, seed)
    for block_name, attachment in attachments.items():
        declared.update(dict.fromkeys(attachment.added.trained, block_name))
    # Order by the model, not by the run file: every rank and every resume sees the same order.
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in declared)
    _prove_complete(model, base, declared, tuple(attachments.values()))
    _warn_of_frozen_noise(model)
    full = tuple(c for c, block in components.items() if block.mode == "full")
    owner = {name: declared[name] for name in named if name in declared}
    return Trainable(owner, tuple(attachments.values()), full)


def _refuse_shared_modules(
    targets: Mapping[str, Target], components: Mapping[str, ComponentConfig]
) -> None:
    """A linear carries one adapter."""
    taken: dict[str, str] = {}
    problems: dict[tuple[str, ...], str] = {}
    for block_name, target in targets.items():
        problems |= _twice_without_linears(block_name, targets, components)
        for linear in target.linears:
            other = taken.setdefault(linear.name, block_name)
            if other != block_name:
                problems[block_name, other, linear.sublayer] = (
                    f"components.{block_name}: adapts {linear.sublayer} ({linear.name}, …), as"
                    f" components.{other} does; give them other sublayers, roles or layers"
                )
    if problems:
        raise ConfigError(list(problems.values()))


def _twice_without_linears(
    block_name: str, targets: Mapping[str, Target], components: Mapping[str, ComponentConfig]
) -> dict[tuple[str, ...], str]:
    """What sits in whole blocks, or beside them, sits there once."""
    here, problems = targets[block_name], {}
    for other, there in targets.items():
        same = (here.component, components[block_name].method)
        if other == block_name or same != (there.component, components[other].method):
            continue
        if not here.linears and set(here.blocks) & set(there.blocks):
            text = f"components.{block_name}: '{same[1]}' is there already, as components.{other}"
            problems[tuple(sorted((block_name, other)))] = f"{text}; give them other layers, or one"
    return problems


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The whole shape of each module's weight, by the module's name."""
    return {
        name.removesuffix(".weight"): tuple(whole_shape(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }


def _target(model: Any, family: Family, block_name: str, block: ComponentConfig) -> Target:
    from mmtrain.models.taps import OfferedTaps, taps_of

    component, label = component_and_label(block_name)
    linears: tuple[Linear, ...] = ()
    pattern = ""
    if plugins.load("method", str(block.method)).needs_linears:
        linears, pattern = select(family, block_name, block, weight_shapes(model))
    own = (n for n, _ in model.named_parameters() if component_of(family, n) == component)
    modules = (name for name, _ in model.named_modules())
    blocks = chosen_blocks(family, block_name, block, modules)
    has_attention = component in family.sublayers
    attention = family.code.attention(model.config, component) if has_attention else None
    taps = OfferedTaps(taps_of(model), family.taps)
    return Target(component, model, tuple(own), linears, pattern, blocks, attention, taps, label)


def _attach_all(
    targets: Mapping[str, Target], components: Mapping[str, ComponentConfig], seed: int
) -> dict[str, Attachment]:
    """Every method, or every reason why one cannot go where it is to."""
    attachments: dict[str, Attachment] = {}
    problems: list[str] = []
    for block_name, target in targets.items():
        try:
            attachments[block_name] = _attach(target, components[block_name], seed)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return attachments


def _attach(target: Target, block: ComponentConfig, seed: int) -> Attachment:
    method: Method = plugins.load("method", str(block.method))
    options = method.options.model_validate(block.method_options)
    added = method.attach(target, options, seed)
    _move_to_base(target, added)
    return Attachment(str(block.method), method, options, target, added)


def _move_to_base(target: Target, added: Added) -> None:
    """What was made on the host goes where the base is: not every model gets an engine.

    Beside quantised weights peft leaves what it adds in fp32.
    """
    base = next(one for one in target.model.parameters() if one.is_floating_point())
    for name in added.trained:
        parameter = target.model.get_parameter(name)
        if (parameter.device, parameter.dtype) != (base.device, base.dtype):
            parameter.data = parameter.data.to(base.device, base.dtype)


def _prove_complete(
    model: nn.Module,
    base: Mapping[str, nn.Parameter],
    declared: Collection[str],
    attachments: Sequence[Attachment],
) -> None:
    """Nothing declared is missing, and nothing that a method added is left unsaid or frozen."""
    named = dict(model.named_parameters())
    stored = {name for one in attachments for name in one.added.stored}
    missing = set(declared) - set(named) | (stored - {name for name, _ in model.named_buffers()})
    assert not missing, f"declared but not in the model: {sorted(missing)[:5]}"
    of_base = set(map(id, base.values()))  # a method may rename them
    unsaid = {n for n, p in named.items() if n not in declared and id(p) not in of_base}
    assert not unsaid, f"added but not declared: {sorted(unsaid)[:5]}"


def _warn_of_frozen_noise(model: nn.Module) -> None:
    """Weights that `allow_reinit` drew at random and that nothing trains."""
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter, FRESH, False) and not parameter.requires_grad
    ]
    if frozen:
        log.warning(
            "%d tensors were initialised afresh and stay frozen, as %s: random weights that nothing"
            " trains; give their component mode 'full'",
            len(frozen),
            frozen[0],
        )
