"""DeepSpeed files by name or path. They say how state is spread, and nothing about learning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError, nearest

# What the run file decides. DeepSpeed would silently prefer its own file, so none may be there.
_DECIDED_BY_RUN_FILE = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.global_batch and optim.micro_batch",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.max_grad_norm",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
}


def deepspeed_names() -> list[str]:
    """The files that come with the package, without their ending."""
    files = resources.files("ds_configs").iterdir()
    return sorted(file.name[: -len(".json")] for file in files if file.name.endswith(".json"))


def find_deepspeed_config(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed settings of a name in ds_configs/ or of a JSON file."""
    source = _read(name_or_path)
    try:
        settings = json.loads(source)
    except json.JSONDecodeError as error:
        raise _problem(name_or_path, f"is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise _problem(name_or_path, "must be a JSON object")
    problems = list(_problems(settings))
    if problems:
        raise ConfigError(f"parallel.deepspeed: '{name_or_path}': {item}" for item in problems)
    return settings


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed file; DeepSpeed's default is 0."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _read(name_or_path: str) -> str:
    is_path = name_or_path.endswith(".json") or "/" in name_or_path
    if not is_path and name_or_path in deepspeed_names():
        return resources.files("ds_configs").joinpath(f"{name_or_path}.json").read_text("utf-8")
    if not is_path:
        remedy = nearest(name_or_path, deepspeed_names())
        raise _problem(name_or_path, f"no such file in ds_configs; {remedy} or a path ending .json")
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except OSError as error:
        raise _problem(name_or_path, f"cannot be read ({error.strerror})") from None


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, owner in _DECIDED_BY_RUN_FILE.items():
        if key in settings:
            yield f"'{key}' does not belong here, the run file's {owner} decides it; remove it"
    for place in _autos(settings, ""):
        if place.split(".")[0] not in _DECIDED_BY_RUN_FILE:
            yield f"'{place}' is 'auto', which only the Hugging Face Trainer fills in; remove it"
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3"


def _autos(value: Any, place: str) -> Iterator[str]:
    if value == "auto":
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{place}.{key}" if place else key)


def _problem(name: str, text: str) -> ConfigError:
    return ConfigError([f"parallel.deepspeed: '{name}': {text}"])
