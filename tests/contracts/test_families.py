"""What every model family promises; families are found by listing the folder."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from mmtrain import plugins
from mmtrain.config.schema import ComponentConfig
from mmtrain.models.interface import ModelOptions
from mmtrain.peft.placement import (
    LAYER_GROUP,
    component_of,
    layer_numbers,
    select,
    select_parameters,
)

CHECK_LIMIT_S = 30
PRESETS = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
]
COMPONENTS = [
    (name, component)
    for name in plugins.names("family")
    for component in plugins.load("family", name).sublayers
]


@cache
def skeleton(name: str, preset: str) -> tuple[Any, Any, float]:
    """Configuration, model on the meta device, and the seconds it took."""
    import torch

    family = plugins.load("family", name)
    started_s = time.monotonic()
    config = family.model_config(ModelOptions(checkpoint=None, preset=preset))
    with torch.device("meta"):
        model = family.skeleton(config)
    return config, model, time.monotonic() - started_s


def smallest(name: str) -> tuple[Any, Any]:
    presets = plugins.load("family", name).presets
    config, model, _ = skeleton(name, "tiny" if "tiny" in presets else next(iter(presets)))
    return config, model


def roles(name: str) -> Iterator[tuple[str, str, str, str]]:
    for component, sublayers in plugins.load("family", name).sublayers.items():
        for sublayer, regexes in sublayers.items():
            for role, regex in regexes.items():
                yield component, sublayer, role, regex


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_build_on_the_meta_device_quickly(name: str, preset: str) -> None:
    _, model, seconds = skeleton(name, preset)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert seconds < CHECK_LIMIT_S


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_components_partition_every_parameter(name: str, preset: str) -> None:
    family = plugins.load("family", name)
    _, model, _ = skeleton(name, preset)
    # component_of fails unless exactly one component claims the parameter.
    owners = [component_of(family, parameter) for parameter, _ in model.named_parameters()]
    assert set(owners) == set(family.components), "a component owns no parameter"


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_role_is_anchored_and_numbered_and_matches_linear_modules(
    name: str, preset: str
) -> None:
    family = plugins.load("family", name)
    _, model, _ = skeleton(name, preset)
    modules = dict(model.named_modules())
    for component, sublayer, role, regex in roles(name):
        where = f"{component}.{sublayer}.{role}"
        assert regex.count(LAYER_GROUP) == 1, f"{where}: no group {LAYER_GROUP}"
        assert not regex.startswith(".*"), f"{where}: begins anywhere, so it is not anchored"
        matched = [module for module in modules if re.fullmatch(regex, module)]
        assert matched, f"{where} matches nothing"
        for module in matched:
            assert component_of(family, f"{module}.weight") == component
            assert modules[module].weight.dim() == 2, f"{where}: {module} is not linear"


@pytest.mark.parametrize("name", plugins.names("family"))
def test_no_module_plays_two_roles(name: str) -> None:
    _, model = smallest(name)
    for module, _ in model.named_modules():
        playing = [found for found in roles(name) if re.fullmatch(found[-1], module)]
        assert len(playing) <= 1, (module, playing)


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_attention_agrees_with_the_modules(name: str, component: str) -> None:
    family = plugins.load("family", name)
    config, model = smallest(name)
    shape = family.attention(config, component)
    names = [module for module, _ in model.named_modules()]
    assert len(set(layer_numbers(family, component, names).values())) == shape.layers
    assert shape.heads % shape.kv_heads == 0
    assert min(shape.layers, shape.heads, shape.head_dim, shape.hidden) > 0


@pytest.mark.parametrize("name", plugins.names("family"))
def test_default_roles_exist(name: str) -> None:
    family = plugins.load("family", name)
    known = {(component, role) for component, _, role, _ in roles(name)}
    for method, by_component in family.default_roles.items():
        for component, wanted in by_component.items():
            assert {(component, role) for role in wanted} <= known, method


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_placements_select_what_they_say(name: str, component: str) -> None:
    family = plugins.load("family", name)
    _, model = smallest(name)
    modules = [module for module, _ in model.named_modules()]
    for sublayer, regexes in family.sublayers[component].items():
        block = ComponentConfig(
            mode="peft", method="any", sublayers={sublayer: list(regexes)}, layers="last-1"
        )
        placed = select(family, component, block, modules)
        numbers = layer_numbers(family, component, modules)
        expected = {
            module
            for module in modules
            if any(re.fullmatch(regex, module) for regex in regexes.values())
            and numbers[module] == max(numbers.values())
        }
        assert set(placed.module_names) == expected
        assert "?P<" not in placed.pattern
        assert {m for m in modules if re.fullmatch(placed.pattern, m)} == expected


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_full_training_of_the_last_layer_leaves_the_rest_frozen(name: str, component: str) -> None:
    family = plugins.load("family", name)
    _, model = smallest(name)
    parameters = [parameter for parameter, _ in model.named_parameters()]
    whole = select_parameters(family, component, ComponentConfig(mode="full"), parameters)
    assert {component_of(family, parameter) for parameter in whole} == {component}
    block = ComponentConfig(mode="full", layers="last-1")
    last = select_parameters(family, component, block, parameters)
    numbers = layer_numbers(family, component, whole)
    assert last and set(last) < set(whole)
    assert {numbers[parameter] for parameter in last} == {max(numbers.values())}
