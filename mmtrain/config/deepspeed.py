"""DeepSpeed files by name or path. They say how state is spread, and nothing about learning."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError, nearest

_OBEYED = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
)
# Everything else is refused, not overridden: DeepSpeed would silently prefer its own file.
_DECIDED_ELSEWHERE = {
    "train_batch_size": "the run file's optim.global_batch decides it",
    "train_micro_batch_size_per_gpu": "the run file's optim.micro_batch decides it",
    "gradient_accumulation_steps": "the run file's optim.global_batch and optim.micro_batch"
    " decide it",
    "optimizer": "the run file's optim decides it",
    "scheduler": "the run file's optim.schedule decides it",
    "gradient_clipping": "the run file's optim.max_grad_norm decides it",
    "fp16": "the run file's model.dtype decides it",
    "bf16": "the run file's model.dtype decides it",
    "bfloat16": "the run file's model.dtype decides it",
    "amp": "the run file's model.dtype decides it",
    "torch_autocast": "the run file's model.dtype decides it",
    "activation_checkpointing": "the run file's parallel.activation_checkpointing decides it",
    "data_types": "gradients are always summed in fp32",
    "communication_data_type": "gradients always travel in fp32",
    "steps_per_print": "progress is logged by mmtrain",
}
_LARGEST_FILE_BYTES = 2**20


def deepspeed_names() -> list[str]:
    """The files that come with the package, without their ending."""
    files = resources.files("ds_configs").iterdir()
    return sorted(file.name[: -len(".json")] for file in files if file.name.endswith(".json"))


def find_deepspeed_config(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed settings of a name in ds_configs/ or of a JSON file."""
    try:
        settings = json.loads(_read(name_or_path), object_pairs_hook=_without_repeats)
        if not isinstance(settings, dict):
            raise _problem(name_or_path, "must be a JSON object")
        problems = list(_problems(settings))
    except ValueError as error:
        raise _problem(name_or_path, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise _problem(name_or_path, "is nested too deeply to be a DeepSpeed file") from None
    if problems:
        raise ConfigError(f"parallel.deepspeed: {name_or_path!r}: {item}" for item in problems)
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
    return _text_of(name_or_path)


def _text_of(name_or_path: str) -> str:
    """The content of a file that may be anything."""
    try:
        path = Path(name_or_path)
        if not stat.S_ISREG(path.stat().st_mode):
            raise _problem(name_or_path, "is no regular file")
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        if len(content) > _LARGEST_FILE_BYTES:
            raise _problem(name_or_path, "is larger than 1 MiB, no DeepSpeed file")
        return content.decode()
    except OSError as error:
        raise _problem(name_or_path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise _problem(name_or_path, "is no text, so no JSON") from None
    except ValueError:
        raise _problem(name_or_path, "is no path: it holds a NUL character") from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a key that stands there twice, json would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{max(keys, key=keys.count)}' stands there twice")
    return found


def _problems(settings: Mapping[str, Any]) -> Iterator[str]:
    for key in settings:
        if key in _DECIDED_ELSEWHERE:
            yield f"'{key}' does not belong here, {_DECIDED_ELSEWHERE[key]}; remove it"
        elif key not in _OBEYED:
            yield f"'{key}' does not say how state is spread; {nearest(key, _OBEYED)}; or remove it"
        else:
            for place in _autos(settings[key], key):
                yield f"'{place}' is 'auto', which only Hugging Face's Trainer fills in; remove it"
    if settings.get("zero_allow_untested_optimizer", True) is not True:
        yield "'zero_allow_untested_optimizer' must be true: torch's AdamW trains; remove it"
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3"
    elif "offload_optimizer" in zero and settings.get("zero_force_ds_cpu_optimizer") is not False:
        yield 'offload_optimizer needs "zero_force_ds_cpu_optimizer": false: torch\'s AdamW trains'


def _autos(value: object, place: str) -> Iterator[str]:
    if value == "auto":
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{place}.{key}")


def _problem(name: str, text: str) -> ConfigError:
    return ConfigError([f"parallel.deepspeed: {name!r}: {text}"])
