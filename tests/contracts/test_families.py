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
    chosen_blocks,
    component_of,
    layer_numbers,
    select,
    select_parameters,
)
from mmtrain.peft.trainable import weight_shapes

CHECK_LIMIT_S = 30
PRESETS = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
]
TINY = [(name, preset) for name, preset in PRESETS if preset.startswith("tiny")]
COMPONENTS = [
    (name, preset, component)
    for name, preset in TINY
    for component in plugins.load("family", name).sublayers
]
TINY_PARAMETERS = 5_000_000


@cache
def skeleton(name: str, preset: str) -> tuple[Any, Any, float]:
    """Configuration, model on the meta device, and the seconds it took."""
    import torch

    family = plugins.load("family", name)
    started_s = time.monotonic()
    config = family.code.model_config(ModelOptions(checkpoint=None, preset=preset))
    with torch.device("meta"):
        model = family.code.skeleton(config)
    return config, model, time.monotonic() - started_s


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
        for module in (one for one in modules if re.fullmatch(regex, one)):
            assert component_of(family, f"{module}.weight") == component
            assert modules[module].weight.dim() == 2, f"{where}: {module} is not linear"


@pytest.mark.parametrize("name", plugins.names("family"))
def test_every_role_is_played_in_some_preset(name: str) -> None:
    presets = plugins.load("family", name).presets
    modules = {module for one in presets for module, _ in skeleton(name, one)[1].named_modules()}
    for component, sublayer, role, regex in roles(name):
        assert any(re.fullmatch(regex, m) for m in modules), f"{component}.{sublayer}.{role}"


@pytest.mark.parametrize(("name", "preset"), TINY)
def test_no_module_plays_two_roles(name: str, preset: str) -> None:
    """In several sublayers (T5's attn and cross_attn) it may play the same one."""
    _, model, _ = skeleton(name, preset)
    for module, _ in model.named_modules():
        playing = {(c, role) for c, _, role, regex in roles(name) if re.fullmatch(regex, module)}
        assert len(playing) <= 1, (module, playing)


@pytest.mark.parametrize("name", plugins.names("family"))
def test_every_family_has_a_tiny_model(name: str) -> None:
    assert "tiny" in plugins.load("family", name).presets


@pytest.mark.parametrize(("name", "preset"), TINY)
def test_tiny_models_are_tiny(name: str, preset: str) -> None:
    _, model, _ = skeleton(name, preset)
    assert sum(parameter.numel() for parameter in model.parameters()) < TINY_PARAMETERS


@pytest.mark.parametrize("name", plugins.names("family"))
def test_no_two_families_read_the_same_model_type(name: str) -> None:
    mine = set(plugins.load("family", name).model_types)
    others = (plugins.load("family", one) for one in plugins.names("family") if one != name)
    assert mine and not any(mine & set(other.model_types) for other in others)


@pytest.mark.parametrize(("name", "preset", "component"), COMPONENTS)
def test_attention_agrees_with_the_modules(name: str, preset: str, component: str) -> None:
    family = plugins.load("family", name)
    config, model, _ = skeleton(name, preset)
    shape = family.code.attention(config, component)
    names = [module for module, _ in model.named_modules()]
    blocks = chosen_blocks(family, component, ComponentConfig(mode="full"), names)
    assert list(blocks) == list(range(shape.layers))
    inside = layer_numbers(family, component, names)
    assert set(inside.values()) == set(blocks)
    for number, tops in blocks.items():
        assert tops and all(inside[top] == number for top in tops)
    assert shape.heads % shape.kv_heads == 0
    assert min(shape.layers, shape.heads, shape.head_dim, shape.hidden) > 0
    assert family.code.image_tokens(config, component) > 0


@pytest.mark.parametrize("name", plugins.names("family"))
def test_default_roles_exist(name: str) -> None:
    family = plugins.load("family", name)
    known = {(component, sublayer, role) for component, sublayer, role, _ in roles(name)}
    for method, by_component in family.default_roles.items():
        assert method in plugins.names("method")
        for component, by_sublayer in by_component.items():
            for sublayer, wanted in by_sublayer.items():
                assert {(component, sublayer, role) for role in wanted} <= known, method


@pytest.mark.parametrize(("name", "preset", "component"), COMPONENTS)
def test_placements_select_what_they_say(name: str, preset: str, component: str) -> None:
    family = plugins.load("family", name)
    _, model, _ = skeleton(name, preset)
    modules = [module for module, _ in model.named_modules()]
    numbers = layer_numbers(family, component, modules)
    for sublayer, regexes in family.sublayers[component].items():
        played = [m for m in modules if any(re.fullmatch(r, m) for r in regexes.values())]
        if not played:
            continue  # this preset's model has no such sublayer; another preset's has
        last = max(numbers[module] for module in played)
        block = ComponentConfig(
            mode="peft", method="any", sublayers={sublayer: list(regexes)}, layers=[last]
        )
        linears, pattern = select(family, component, block, weight_shapes(model))
        expected = {module for module in played if numbers[module] == last}
        assert {linear.name for linear in linears} == expected
        assert {(linear.sublayer, linear.layer) for linear in linears} == {(sublayer, last)}
        assert all(re.fullmatch(regexes[linear.role], linear.name) for linear in linears)
        assert "?P<" not in pattern
        assert {m for m in modules if re.fullmatch(pattern, m)} == expected


@pytest.mark.parametrize(("name", "preset", "component"), COMPONENTS)
def test_full_training_of_the_last_layer_leaves_the_rest_frozen(
    name: str, preset: str, component: str
) -> None:
    family = plugins.load("family", name)
    _, model, _ = skeleton(name, preset)
    parameters = [parameter for parameter, _ in model.named_parameters()]
    whole = select_parameters(family, component, ComponentConfig(mode="full"), parameters)
    assert {component_of(family, parameter) for parameter in whole} == {component}
    block = ComponentConfig(mode="full", layers="last-1")
    last = select_parameters(family, component, block, parameters)
    numbers = layer_numbers(family, component, whole)
    assert last and set(last) < set(whole)
    assert {numbers[parameter] for parameter in last} == {max(numbers.values())}
