"""Run files: YAML text and dotted overrides -> RunConfig, every problem reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.config import yaml_text
from mmtrain.config.generation import without_block_keys
from mmtrain.config.problems import checked, shown
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with `a.b=c` overrides applied; paths in it stay relative to the cwd.

    Checks the core schema only: `mmtrain.resolve.resolve` also checks what plug-ins know.
    """
    data, problems = read_data(path, overrides)
    config, more = checked(RunConfig, data)
    if config is None or problems or more:
        raise ConfigError([*problems, *more], str(path))
    return config


def read_data(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, object], list[str]]:
    """The raw mapping of a run file with overrides, and the problems met on the way."""
    remedy = "give the path of a run file; `mmtrain init` writes one"
    data, problems = yaml_text.parse(yaml_text.read_text(path, remedy))
    if problems and data is None:
        raise ConfigError(problems, str(path))
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {shown(data)}"
        raise ConfigError([f"the file {found}; a run file is a mapping with 'model'"], str(path))
    merged, more = with_overrides(data, overrides)
    return merged, [*problems, *more]


def with_overrides(
    data: Mapping[str, object], overrides: Sequence[str]
) -> tuple[dict[str, object], list[str]]:
    """A copy of the data with each `a.b=c` set; the value is read as YAML.

    A section left empty (`optim:` with every line commented out) takes its defaults.
    """
    merged = _copied(data)
    problems: list[str] = []
    section = merged.get("generation")
    if isinstance(section, dict) and any(one.startswith("generation.like=") for one in overrides):
        # A block that is named here counts more than the file's values, such as a saved one's.
        merged["generation"] = without_block_keys(section)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"override {shown(override)}: write it as section.key=value")
            continue
        value, faults = yaml_text.parse(text)
        problems += [f"override {shown(override)}: {fault}" for fault in faults]
        if not faults:
            problems += _set(merged, key.split("."), value)
    return {key: value for key, value in merged.items() if value is not None}, problems


def _copied(data: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()
    }


def _set(data: dict[str, Any], keys: Sequence[str], value: Any) -> list[str]:
    here = data
    for depth, key in enumerate(keys[:-1], start=1):
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            above = ".".join(keys[:depth])
            return [
                f"{'.'.join(keys)}: cannot be set, {above} is {shown(here, above)}, not a section"
            ]
    here[keys[-1]] = value
    return []


def dump_run(config: RunConfig) -> str:
    """The resolved run file: every key with its value, readable by `load_run_file`."""
    return yaml_text.dump(config.model_dump(mode="json", by_alias=True))


def flatten_run(config: RunConfig) -> dict[str, object]:
    """The run as dotted keys and plain values; empty sections are left out."""
    flat: dict[str, object] = {}
    pending: list[tuple[str, object]] = [("", config.model_dump(mode="json", by_alias=True))]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{prefix}.{key}" if prefix else key, value[key]) for key in value]
        else:
            flat[prefix] = value
    return dict(sorted(flat.items()))


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """The dotted keys whose values differ between two runs."""
    left, right = flatten_run(a), flatten_run(b)
    missing = object()
    return [
        key
        for key in sorted(left.keys() | right.keys())
        if left.get(key, missing) != right.get(key, missing)
    ]
