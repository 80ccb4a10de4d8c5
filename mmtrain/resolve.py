"""RunConfig -> plug-ins: the only place where names of a run file become modules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain import plugins
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.load import read_data, with_overrides
from mmtrain.config.problems import checked, shown
from mmtrain.config.schema import (
    LARGEST_BATCH,
    RESERVED_COMPONENT_KEYS,
    ComponentConfig,
    RunConfig,
    component_and_label,
)
from mmtrain.data.remote import url_problem
from mmtrain.errors import ConfigError, MmtrainError, nearest
from mmtrain.models.interface import Family, ModelOptions
from mmtrain.peft.interface import Surroundings
from mmtrain.peft.placement import sublayer_problems
from mmtrain.tasks.choice import data_problems, with_template_names
from mmtrain.tracking.uri import DISABLED, URI_EXAMPLES, uri_problem


def resolve(
    source: str | Path | Mapping[str, object],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
) -> RunConfig:
    """A run file, path or data, checked by the schema and by every plug-in it names, in one report.

    The result has the plug-ins' defaults filled in, so that it says all that the run will do.
    """
    if isinstance(source, Mapping):
        name = "configuration"
        data, problems = with_overrides(source, overrides)
    else:
        name = str(source)
        data, problems = read_data(source, overrides)
    config, found = checked(RunConfig, data)
    problems += found
    problems += _model_problems(_section(data, "model"), _section(data, "components"))
    problems += data_problems(_section(data, "data"), _section(data, "validate"))
    problems += _shard_place_problems(_section(data, "data"))
    problems += _tracking_problems(_section(data, "tracking"))
    problems += _layout_problems(data, world_size)
    problems += _initial_problems(data.get("init_from"), config)
    if config is not None and not problems:
        problems += _method_conflicts(config)
    if config is None or problems:
        raise ConfigError(dict.fromkeys(problems), name)
    return _with_defaults(config)


def model_options(config: RunConfig) -> ModelOptions:
    """What the family needs to know of a run."""
    model = config.model
    return ModelOptions(
        checkpoint=model.checkpoint,
        preset=model.preset,
        dtype=model.dtype,
        attention=model.attention,
        base_dropout=model.base_dropout,
        seed=config.seed,
        vision_tower=model.vision_tower,
        overrides={
            component: change.model_dump(exclude_none=True)
            for component, change in model.overrides.items()
        },
        allow_reinit=model.allow_reinit,
        max_pixels=model.max_pixels,
        grounding_tokens=bool(model.grounding_tokens),
        quantization=model.quantization,
        quantized=_quantized(config) if model.quantization else (),
    )


def _quantized(config: RunConfig) -> tuple[str, ...]:
    """Which linears hold their weights in fewer bits: all that sublayers of the LLM name."""
    sublayers = plugins.load("family", config.model.family).sublayers["llm"]
    return tuple(sorted({regex for roles in sublayers.values() for regex in roles.values()}))


def method_options(block: ComponentConfig) -> Any:
    """The typed options of a block's method; None where the block has no method."""
    if block.method is None:
        return None
    return plugins.load("method", block.method).options(**block.method_options)


def _section(data: Mapping[str, object], key: str) -> Mapping[str, Any]:
    """A section of raw data; wrong shapes are reported by the schema."""
    section = data.get(key)
    return section if isinstance(section, Mapping) else {}


def _plugin(kind: str, name: object, place: str) -> tuple[Any, list[str]]:
    if not isinstance(name, str):
        return None, []
    try:
        return plugins.load(kind, name), []
    except MmtrainError as error:
        return None, [f"{place}: {error}"]


def _model_problems(model: Mapping[str, object], components: Mapping[str, object]) -> list[str]:
    """Unknown family, preset, components, and what is wrong inside each component block."""
    family, problems = _plugin("family", model.get("family"), "model.family")
    preset = model.get("preset")
    if family and isinstance(preset, str) and preset not in family.presets:
        hint = nearest(preset, family.presets)
        problems.append(f"model.preset: '{model['family']}' has no preset '{preset}'; {hint}")
    problems += _own_option_problems(family, model) if family else []
    for name, block in components.items():
        component, label = component_and_label(name)
        if family and component not in family.components:
            hint = nearest(component, family.components)
            problems.append(f"components.{name}: unknown component; {hint}")
        elif isinstance(block, Mapping):
            problems += _block_problems(family, name, block)
        if "/" in name and not re.fullmatch(r"[A-Za-z0-9_]+", label):
            problems.append(f"components.{name}: give letters and digits behind '/', as in llm/mlp")
    return problems + _shared_component_problems(components)


def _shared_component_problems(components: Mapping[str, object]) -> list[str]:
    """A component may be adapted in several ways, or trained in full, or frozen."""
    modes: dict[str, dict[str, object]] = {}
    for name, block in components.items():
        if isinstance(block, Mapping):
            modes.setdefault(component_and_label(name)[0], {})[name] = block.get("mode")
    return [
        f"components: {' and '.join(blocks)} share a component, which only blocks with mode peft"
        " can; keep one of them"
        for blocks in modes.values()
        if len(blocks) > 1 and set(blocks.values()) != {"peft"}
    ]


def _own_option_problems(family: Family, model: Mapping[str, object]) -> list[str]:
    """Keys that only some families read: ignoring one would be silent."""
    families = {name: plugins.load("family", name) for name in plugins.names("family")}
    special = {key for each in families.values() for key in each.own_options}
    problems = []
    for key in sorted(special - set(family.own_options)):
        if model.get(key) is not None:
            readers = [name for name, each in families.items() if key in each.own_options]
            problems.append(
                f"model.{key}: '{model['family']}' does not read it (only {', '.join(readers)});"
                " remove it"
            )
    return problems


def _block_problems(family: Family | None, name: str, raw: Mapping[str, object]) -> list[str]:
    """What the method and the family say about one component block."""
    place = f"components.{name}"
    method, problems = _plugin("method", raw.get("method"), f"{place}.method")
    if method:
        options = {key: raw[key] for key in raw if key not in RESERVED_COMPONENT_KEYS}
        problems += checked(method.options, options, place, sorted(RESERVED_COMPONENT_KEYS))[1]
    block, _ = checked(ComponentConfig, raw)
    if family and block and (block.mode == "peft" or block.sublayers is not None):
        needs_linears = method is None or method.needs_linears
        problems += sublayer_problems(family, name, block, needs_linears)
    return problems


def _method_conflicts(config: RunConfig) -> list[str]:
    """Methods that cannot go where the run file puts them."""
    family: Family = plugins.load("family", config.model.family)
    stage = zero_stage(find_deepspeed_config(config.parallel.deepspeed))
    problems = []
    for name, block in config.components.items():
        if block.method is not None:
            component, _ = component_and_label(name)
            recomputes = config.parallel.activation_checkpointing
            quantized = config.model.quantization is not None and component == "llm"
            around = Surroundings(family, component, stage, recomputes, quantized)
            method = plugins.load("method", block.method)
            reasons = method.conflicts(method_options(block), around)
            problems += [f"components.{name}.{reason}" for reason in reasons]
    return problems + _quantization_problems(config, stage)


def _quantization_problems(config: RunConfig, stage: int) -> list[str]:
    """Weights of four or eight bits are whole, and frozen."""
    how = config.model.quantization
    if how is None:
        return []
    problems = []
    if stage == 3:
        problems.append(
            f"model.quantization: ZeRO-3 would shard weights in {how}, which cannot be put"
            " together again; use parallel.deepspeed: zero2, or zero1"
        )
    if "llm" in config.components and config.components["llm"].mode == "full":
        problems.append(
            f"components.llm.mode: weights in {how} are frozen, they cannot train in full; use a"
            " method, or no model.quantization"
        )
    return problems


def _shard_place_problems(data: Mapping[str, Any]) -> list[str]:
    """URLs that can be no shard folder."""
    mix = data.get("mix")
    parts = {f"data.mix[{n}].": part for n, part in enumerate(mix if isinstance(mix, list) else [])}
    return [
        f"{place}{split}: {problem}"
        for place, part in {"data.": data, **parts}.items()
        for split in ("train", "val")
        if isinstance(part, Mapping) and isinstance(part.get(split), str)
        if (problem := url_problem(part[split])) is not None
    ]


def _tracking_problems(tracking: Mapping[str, object]) -> list[str]:
    uri = tracking.get("uri")
    problem = uri_problem(uri) if isinstance(uri, str) and uri != DISABLED else None
    return [f"tracking.uri: {problem}; use {URI_EXAMPLES}"] if problem else []


def is_run_folder(folder: Path) -> bool:
    """Whether a run was trained there."""
    return (folder / "run.yaml").is_file()


def adapter_files(folder: Path) -> list[Path]:
    """The weights of an exported adapter: one file, or one in a folder for each component."""
    name = "adapter_model.safetensors"
    return sorted([*folder.glob(name), *folder.glob(f"*/{name}")])


def _initial_problems(given: object, config: RunConfig | None) -> list[str]:
    """What is wrong with the folder that training is to start from, without reading a tensor."""
    if not isinstance(given, str):
        return []
    remedy = "give the folder of a trained run, or the adapter/ in it"
    if not os.path.isdir(given):
        return [f"init_from: there is no folder {shown(given)}; {remedy}"]
    if not is_run_folder(Path(given)) and not adapter_files(Path(given)):
        return [
            f"init_from: {shown(given)} has no run.yaml and no adapter_model.safetensors; {remedy}"
        ]
    if config and Path(given).resolve().is_relative_to(Path(config.run_dir).resolve()):
        return [
            f"init_from: {shown(given)} is this run's own folder; choose another name or output_dir"
        ]
    return []


def _layout_problems(data: Mapping[str, object], world_size: int | None) -> list[str]:
    """The DeepSpeed file, and whether the batch can be dealt out to the ranks."""
    problems: list[str] = []
    deepspeed = _section(data, "parallel").get("deepspeed", "zero1")
    if isinstance(deepspeed, str):
        try:
            find_deepspeed_config(deepspeed)
        except ConfigError as error:
            problems += error.problems
    optim = _section(data, "optim")
    if optim.get("micro_tokens") is not None:
        if _section(data, "data").get("cut", "order") != "balanced":
            problems.append(
                "optim.micro_tokens: needs data.cut: balanced, which knows how long samples are;"
                " set it, or give micro_batch"
            )
        return problems
    defaults = RunConfig.model_fields["optim"].get_default(call_default_factory=True)
    total = optim.get("global_batch", defaults.global_batch)
    micro = optim.get("micro_batch", defaults.micro_batch)
    if not all(type(size) is int and 1 <= size <= LARGEST_BATCH for size in (total, micro)):
        return problems  # the schema says so
    ranks = world_size or 1
    if total % (micro * ranks):
        product = f"micro_batch {micro}" + (f" x {ranks} ranks" if world_size else "")
        smaller = range(min(micro - 1, total // ranks), 0, -1)
        better = next((size for size in smaller if total % (size * ranks) == 0), None)
        remedy = f"micro_batch {better}" if better else f"a multiple of {ranks} ranks"
        problems.append(
            f"optim.global_batch: {shown(total)} is no multiple of {product}; use {remedy}"
        )
    return problems


def _with_defaults(config: RunConfig) -> RunConfig:
    components = {
        name: (
            block.model_copy(update=method_options(block).model_dump(mode="json"))
            if block.method
            else block
        )
        for name, block in config.components.items()
    }
    data = config.data
    data = with_template_names(data) if data else None
    if data and data.max_length is None:
        family = plugins.load("family", config.model.family)
        data = data.model_copy(update={"max_length": family.default_max_length})
    return config.model_copy(update={"components": components, "data": data})
