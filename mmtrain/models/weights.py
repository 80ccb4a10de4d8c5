"""Filling a model from safetensors, one tensor at a time, sharded (ZeRO-3) or not.

Everything that can be wrong with a folder is found from the files' headers, before the first
tensor is read: nothing is ever half-loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmtrain.distributed import full_shape, is_main, is_sharded, write_parameter
from mmtrain.errors import CheckpointError
from mmtrain.models.dropout import stable_hash
from mmtrain.models.host_memory import returning_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder, or a clear error."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name} there.", "Give a folder in Hugging Face format."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}).", "Copy it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object.", "Copy it again.")
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """tensor name -> file, from the index or from the one file there is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: holds no 'weight_map'.", "Copy it again.")
        files = {name: folder / file for name, file in weight_map.items()}
        missing = sorted({str(path.name) for path in files.values() if not path.exists()})
        if missing:
            raise CheckpointError(
                f"{folder}: weight files are missing: {', '.join(missing)}.", "Copy them again."
            )
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        raise CheckpointError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json there.",
            "Give a folder in Hugging Face format with safetensors weights.",
        )
    with open_weights(single) as reader:
        return {name: single for name in reader.keys()}


def open_weights(path: Path) -> Any:
    """Open a safetensors file, or say that it is damaged."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut short ({error}).", "Copy it again."
        ) from error


def _sources(
    folder: Path, rename: Callable[[str], str | None]
) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """our parameter name -> (file, name there, shape there)."""
    sources: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    with ExitStack() as stack:
        readers: dict[Path, Any] = {}
        for stored_name, path in weight_files(folder).items():
            name = rename(stored_name)
            if name is None:
                continue
            if path not in readers:
                readers[path] = stack.enter_context(open_weights(path))
            try:
                shape = tuple(readers[path].get_slice(stored_name).get_shape())
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: has no tensor {stored_name}, which the index says is there.",
                    "Copy file and index again.",
                ) from error
            if name in sources:
                raise CheckpointError(
                    f"{folder}: {name} is stored twice, as {sources[name][1]} and {stored_name}.",
                    "Remove one of them: only one can be meant.",
                )
            sources[name] = (path, stored_name, shape)
    return sources


def _refuse_mismatch(
    folder: Path, sources: Mapping[str, Any], wanted: Mapping[str, torch.Size], tied: set[str]
) -> None:
    problems = []
    missing = sorted(set(wanted) - set(sources) - tied)
    surplus = sorted(set(sources) - set(wanted))
    wrong = [
        f"{name} is {list(sources[name][2])} in the file, {list(wanted[name])} in config.json"
        for name in sorted(set(wanted) & set(sources))
        if tuple(wanted[name]) != tuple(sources[name][2])
    ]
    for label, names in (("missing", missing), ("surplus", surplus), ("wrong shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{len(names)} {label}: {shown}")
    if problems:
        raise CheckpointError(
            f"{folder}: its weights do not fit its config.json: {'; '.join(problems)}.",
            "Check that the folder is a checkpoint of the family named in the run file.",
        )


def load_weights(model: nn.Module, folder: Path, rename: Callable[[str], str | None]) -> None:
    """Fill every parameter from the folder. Under ZeRO-3 only rank 0 reads the files."""
    parameters = dict(model.named_parameters(remove_duplicate=True))
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name: full_shape(parameter) for name, parameter in parameters.items()}
    sources = _sources(folder, rename)
    tied = every_name - set(parameters)
    sources = {name: source for name, source in sources.items() if name not in tied}
    _refuse_mismatch(folder, sources, wanted, tied)
    sharded = any(is_sharded(parameter) for parameter in parameters.values())
    reads = not sharded or is_main()
    by_file = sorted(parameters, key=lambda name: (str(sources[name][0]), name))
    with returning_freed_memory(sharded), ExitStack() as stack:
        readers: dict[Path, Any] = {}
        for name in by_file:
            path, stored_name, _ = sources[name]
            if reads and path not in readers:
                readers[path] = stack.enter_context(open_weights(path))
            value = readers[path].get_tensor(stored_name) if reads else None
            write_parameter(parameters[name], value)


def initialise_weights(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Random weights keyed by (seed, name): the same under every ZeRO stage and world size."""
    for name, parameter in model.named_parameters():
        shape = full_shape(parameter)
        if name.endswith("bias"):
            value = torch.zeros(shape)
        elif len(shape) == 1 and name.endswith("weight"):
            value = torch.ones(shape)
        else:
            # One device whatever the stage: generators of CPU and GPU draw different numbers.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            generator = torch.Generator(device).manual_seed(stable_hash(seed, name))
            value = torch.randn(shape, generator=generator, device=device).mul_(std)
        write_parameter(parameter, value)
