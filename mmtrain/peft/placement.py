"""Where a component block applies: names from the family's sublayer map, never by suffix.

Family, method and run file meet here: the family says which module plays which role in which
layer, the block says which of them it wants. A selection that is empty is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from mmtrain.config.schema import ComponentConfig, component_and_label
from mmtrain.errors import ConfigError, nearest
from mmtrain.models.interface import Family
from mmtrain.peft.interface import Linear

LAYER_GROUP = r"(?P<layer>\d+)"
# sublayer -> roles
Roles = dict[str, tuple[str, ...]]


def select(
    family: Family, block_name: str, block: ComponentConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Linear, ...], str]:
    """The linears a `mode: peft` block selects, and one anchored pattern that matches just them.

    `shapes` are those of every module's weight, by the module's name.
    """
    problems = sublayer_problems(family, block_name, block)
    component, _ = component_and_label(block_name)
    if problems:
        raise ConfigError(problems)
    wanted = chosen_roles(family, component, block)
    regexes = {
        (sublayer, role): family.sublayers[component][sublayer][role]
        for sublayer, roles in wanted.items()
        for role in roles
    }
    layer_of = layer_numbers(family, component, shapes)
    layers = None
    if block.layers not in (None, "all"):
        layers = chosen_layers(block_name, block.layers, sorted(set(layer_of.values())))
    playing = [
        Linear(name, sublayer, role, layer_of.get(name), shape)
        for (sublayer, role), regex in regexes.items()
        for name, shape in shapes.items()
        if re.fullmatch(regex, name) and (layers is None or layer_of.get(name) in layers)
    ]
    # A sublayer asked for by name must exist in this very model: T5's do not in Vicuna.
    filled = {one.sublayer for one in playing}
    empty = [sublayer for sublayer in block.sublayers or () if sublayer not in filled]
    if empty or not playing:
        place = f"components.{block_name}.sublayers"
        asked = (
            f"'{block.method or block.mode}' on {', '.join(empty or wanted) or 'every sublayer'}"
        )
        problem = f"{asked} selects no module; {what_exists(family, component)}"
        raise ConfigError([f"{place}: {problem}; name roles, as in {{attn: [q, v]}}"])
    selected = {one.name: one for one in reversed(playing)}
    pattern = _pattern(list(regexes.values()), layers)
    matched = {name for name in shapes if re.fullmatch(pattern, name)}
    assert matched == set(selected), f"pattern and selection of '{block_name}' disagree"
    return tuple(selected[name] for name in shapes if name in selected), pattern


def chosen_blocks(
    family: Family, block_name: str, block: ComponentConfig, module_names: Iterable[str]
) -> dict[int, tuple[str, ...]]:
    """Layer number -> the names of its blocks, of the layers that the component block means."""
    layer_of = layer_numbers(family, component_and_label(block_name)[0], module_names)
    numbers = chosen_layers(block_name, block.layers, sorted(set(layer_of.values())))
    tops = [name for name in layer_of if name.rpartition(".")[0] not in layer_of]
    return {n: tuple(name for name in tops if layer_of[name] == n) for n in sorted(numbers)}


def sublayer_problems(
    family: Family, block_name: str, block: ComponentConfig, needs_linears: bool = True
) -> list[str]:
    """Every unknown sublayer and role that a block names, or any where its method needs none."""
    component, _ = component_and_label(block_name)
    place = f"components.{block_name}.sublayers"
    if not needs_linears:
        unread = f"{place}: '{block.method}' reads none; leave it out"
        return [] if block.sublayers is None else [unread]
    exists = family.sublayers.get(component, {})
    if not exists:
        usable = ", ".join(sorted(family.sublayers))
        return [
            f"components.{component}: has no sublayers to adapt; use 'full', or one of: {usable}"
        ]
    named = block.sublayers if block.sublayers is not None else list(exists)
    if not named:
        return [f"{place}: is empty; {what_exists(family, component)}"]
    problems = [
        f"{place}: no sublayer '{s}'; {nearest(s, exists)}" for s in named if s not in exists
    ]
    roles_by_sublayer = named.items() if isinstance(named, Mapping) else ()
    for sublayer, roles in roles_by_sublayer:
        known = exists.get(sublayer, roles)
        problems += [
            f"{place}.{sublayer}: no role '{role}'; {nearest(role, known)}"
            for role in roles
            if role not in known
        ]
        if not roles:
            problems.append(f"{place}.{sublayer}: is empty; {nearest('', known)}")
    return problems


def chosen_roles(family: Family, component: str, block: ComponentConfig) -> Roles:
    """The roles of a block: as listed, or the family's defaults for the method."""
    exists = family.sublayers[component]
    if isinstance(block.sublayers, Mapping):
        return {sublayer: tuple(roles) for sublayer, roles in block.sublayers.items()}
    usual = family.default_roles.get(str(block.method), {}).get(component, {})
    chosen = {
        sublayer: tuple(role for role in exists[sublayer] if role in usual.get(sublayer, (role,)))
        for sublayer in (block.sublayers if block.sublayers is not None else exists)
    }
    return {sublayer: roles for sublayer, roles in chosen.items() if roles}


def chosen_layers(
    block_name: str, wanted: str | Sequence[int] | None, exist: Sequence[int]
) -> frozenset[int]:
    """The layer numbers that `layers` of a block means, of those that exist."""
    place = f"components.{block_name}.layers"
    if wanted is None or wanted == "all":
        return frozenset(exist)
    if not exist:
        raise ConfigError([f"{place}: got {wanted!r}, but it has no numbered layers; leave it out"])
    span = f"layers {min(exist)}-{max(exist)} exist"
    if isinstance(wanted, str):
        end, _, count = wanted.partition("-")  # the schema allows first-N and last-N only
        if int(count) > len(exist):
            raise ConfigError([f"{place}: got '{wanted}'; only {span}"])
        return frozenset(exist[: int(count)] if end == "first" else exist[-int(count) :])
    missing = sorted(set(wanted) - set(exist))
    if missing or not wanted:
        raise ConfigError([f"{place}: got {list(wanted)}; {span}"])
    return frozenset(wanted)


def component_of(family: Family, parameter_name: str) -> str:
    """The one component a parameter of the base belongs to."""
    owners = [
        component
        for component, regexes in family.components.items()
        if any(re.fullmatch(regex, parameter_name) for regex in regexes)
    ]
    assert len(owners) == 1, f"{parameter_name} belongs to {owners}, not to one component"
    return owners[0]


def select_parameters(
    family: Family, component: str, block: ComponentConfig, parameter_names: Iterable[str]
) -> tuple[str, ...]:
    """The base parameters a `mode: full` block trains: the component, or some of its layers.

    With `layers`, what lies outside of numbered blocks (embeddings, last norm, head) stays frozen;
    with `sublayers`, all but the weights and biases of these linears.
    """
    owned = tuple(name for name in parameter_names if component_of(family, name) == component)
    if block.sublayers is not None:
        shapes: dict[str, tuple[int, ...]] = {name.rpartition(".")[0]: () for name in owned}
        chosen = {linear.name for linear in select(family, component, block, shapes)[0]}
        return tuple(name for name in owned if name.rpartition(".")[0] in chosen)
    if block.layers is None or block.layers == "all":
        return owned
    layer_of = layer_numbers(family, component, owned)
    layers = chosen_layers(component, block.layers, sorted(set(layer_of.values())))
    return tuple(name for name in owned if layer_of.get(name) in layers)


def layer_numbers(family: Family, component: str, names: Iterable[str]) -> dict[str, int]:
    """The layer number of every numbered block, and of every module or parameter in one."""
    blocks = {
        regex[: regex.index(LAYER_GROUP) + len(LAYER_GROUP)]
        for roles in family.sublayers.get(component, {}).values()
        for regex in roles.values()
        if LAYER_GROUP in regex
    }
    found = ((name, re.match(rf"(?:{block})(?:\.|$)", name)) for name in names for block in blocks)
    return {name: int(match["layer"]) for name, match in found if match}


def what_exists(family: Family, component: str) -> str:
    """A component's sublayers and roles, for error messages."""
    listed = (
        f"{sublayer} ({' '.join(roles)})"
        for sublayer, roles in family.sublayers.get(component, {}).items()
    )
    return f"'{component}' has: {', '.join(listed)}"


def _pattern(regexes: Sequence[str], layers: frozenset[int] | None) -> str:
    """One regex without named groups; peft applies it with `re.fullmatch`."""
    number = r"\d+" if layers is None else f"(?:{'|'.join(map(str, sorted(layers)))})"
    return f"^(?:{'|'.join(regex.replace(LAYER_GROUP, number) for regex in regexes)})$"
