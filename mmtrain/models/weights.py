"""Filling a model from weight files, one tensor at a time, sharded (ZeRO-3) or not.

Everything that can be wrong with a folder is found from the files' headers, before the first
tensor is read: nothing is ever half-loaded.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmtrain.distributed import full_shape, is_main, is_sharded
from mmtrain.errors import CheckpointError
from mmtrain.models.dropout import stable_hash
from mmtrain.models.host_memory import returning_freed_memory
from mmtrain.models.interface import ModelOptions
from mmtrain.models.quantization import set_parameter

# Set on parameters that a checkpoint did not give: left frozen, they stay random.
FRESH = "freshly_initialised"
log = logging.getLogger("mmtrain")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of a checkpoint folder, or a clear error."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name} there.", "Give a folder in Hugging Face format."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}).", "Copy it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object.", "Copy it again.")
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """tensor name -> file, from an index or from the one file there is."""
    for name in _INDEXES:
        if (folder / name).is_file():
            return _indexed(folder, folder / name)
    for name in _SINGLE_FILES:
        single = folder / name
        if single.is_file():
            with open_weights(single) as reader:
                return {tensor: single for tensor in reader.keys()}
    raise CheckpointError(
        f"{folder}: no weights there: neither {_SINGLE_FILES[0]} nor {_INDEXES[0]}, nor .bin"
        " files of the same kind.",
        "Give a folder in Hugging Face format.",
    )


def has_weights(folder: Path) -> bool:
    """Whether there is anything to load in a folder: planning needs its config.json alone."""
    return any((folder / name).is_file() for name in (*_INDEXES, *_SINGLE_FILES))


def check_files(folder: Path) -> None:
    """Open every weight file: a damaged one is an error before any model is built."""
    for path in sorted(set(weight_files(folder).values())):
        with open_weights(path):
            pass


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: holds no 'weight_map'.", "Copy it again.")
    for name, file in weight_map.items():
        # A name that leads elsewhere would read files that nobody meant to give.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: puts {name} in {file!r}, which is no file name.", "Copy it again."
            )
    files = {name: folder / file for name, file in weight_map.items()}
    missing = sorted({str(path.name) for path in files.values() if not path.is_file()})
    if missing:
        raise CheckpointError(
            f"{folder}: weight files are missing: {', '.join(missing)}.", "Copy them again."
        )
    return files


class BinFile:
    """A `.bin` file of tensors, read without unpickling anything else, with safetensors' calls."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}

    def __enter__(self) -> BinFile:
        try:
            # Files older than torch 1.6 are no archives, and cannot be mapped.
            mapped = zipfile.is_zipfile(self._path)
            found = torch.load(self._path, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:  # of such bytes, the reader's parts raise whatever they do
            fault = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{self._path}: damaged, or holds more than tensors ({fault}).",
                "Copy it again, or convert it to safetensors where it is trusted.",
            ) from error
        if not isinstance(found, dict) or not all(torch.is_tensor(v) for v in found.values()):
            raise CheckpointError(
                f"{self._path}: holds no plain table of tensors.", "Give the model's own weights."
            )
        self._tensors = found
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self._tensors[name]


class SafeFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> SafeFile:
        try:
            self._reader = safe_open(str(self._path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._path}: damaged or cut short ({error}).", "Copy it again."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        del self._reader

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._reader.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._reader.get_slice(name).get_shape())

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self._reader.get_tensor(name)


def open_weights(path: Path) -> SafeFile | BinFile:
    """A weight file as a context manager; a damaged one is an error that names it."""
    return BinFile(path) if path.suffix == ".bin" else SafeFile(path)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    name: str
    shape: tuple[int, ...]


# A folder, and what its tensors are called in our module tree (None: no weight of ours).
WeightFolder = tuple[Path, Callable[[str], "str | None"]]


def _found(folders: Sequence[WeightFolder]) -> dict[str, Stored]:
    """our parameter name -> where it lies, over all folders."""
    found: dict[str, Stored] = {}
    with ExitStack() as stack:
        readers: dict[Path, Any] = {}
        for folder, rename in folders:
            for stored_name, path in weight_files(folder).items():
                name = rename(stored_name)
                if name is None:
                    continue
                if path not in readers:
                    readers[path] = stack.enter_context(open_weights(path))
                try:
                    shape = readers[path].shape(stored_name)
                except (SafetensorError, KeyError) as error:
                    raise CheckpointError(
                        f"{path}: has no tensor {stored_name}, which the index says is there.",
                        "Copy file and index again.",
                    ) from error
                if name in found:
                    raise CheckpointError(
                        f"{folder}: {name} is stored twice, as {found[name].name} and"
                        f" {stored_name}.",
                        "Remove one of them: only one can be meant.",
                    )
                found[name] = Stored(path, stored_name, shape)
    return found


def _listed(label: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{len(items)} {label}: {', '.join(items[:3])}{more}"


def _misfits(
    folder: Path,
    found: Mapping[str, Stored],
    wanted: Mapping[str, torch.Size],
    options: ModelOptions,
) -> list[str]:
    """The parameters to initialise afresh: none, unless overrides ask for other shapes."""
    missing = sorted(set(wanted) - set(found))
    surplus = sorted(set(found) - set(wanted))
    wrong = sorted(
        name for name in set(wanted) & set(found) if tuple(wanted[name]) != found[name].shape
    )
    shapes = [
        f"{name} is {list(found[name].shape)} in the file, {list(wanted[name])} in "
        + ("model.overrides" if options.overrides else "config.json")
        for name in wrong
    ]
    parts = (("missing", missing), ("surplus", surplus), ("wrong shape", shapes))
    problems = [_listed(label, items) for label, items in parts if items]
    if problems and not options.overrides:
        raise CheckpointError(
            f"{folder}: its weights do not fit its config.json: {'; '.join(problems)}.",
            "Check that the folder is a checkpoint of the family named in the run file.",
        )
    fresh = [*missing, *wrong]
    if fresh and not options.allow_reinit:
        raise CheckpointError(
            f"{folder}: its weights do not fit model.overrides: {'; '.join(problems)}.",
            "Set model.allow_reinit: true to initialise these afresh, and train them.",
        )
    if problems:
        log.warning("model.overrides: not taken from %s: %s", folder, "; ".join(problems))
    return fresh


def load_weights(
    model: nn.Module, folders: Sequence[WeightFolder], options: ModelOptions
) -> tuple[Path, ...]:
    """Fill every parameter from the folders; the files they came from.

    Under ZeRO-3 only rank 0 reads the files.
    """
    parameters = dict(model.named_parameters(remove_duplicate=True))
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name: full_shape(parameter) for name, parameter in parameters.items()}
    tied = every_name - set(parameters)
    found = {name: where for name, where in _found(folders).items() if name not in tied}
    fresh = _misfits(folders[0][0], found, wanted, options)
    whole = [name for name, parameter in parameters.items() if not is_sharded(parameter)]
    sharded = len(whole) < len(parameters)
    # Only rank 0 reads for sharded ones: a whole one among them would stay unset elsewhere.
    assert not (sharded and whole), f"made outside sharded construction: {whole[:3]}"
    reads = not sharded or is_main()
    stored = sorted(set(parameters) - set(fresh), key=lambda name: (str(found[name].path), name))
    with returning_freed_memory(sharded), ExitStack() as stack:
        readers: dict[Path, Any] = {}
        for name in stored:
            where = found[name]
            if reads and where.path not in readers:
                readers[where.path] = stack.enter_context(open_weights(where.path))
            value = readers[where.path].get_tensor(where.name) if reads else None
            set_parameter(parameters[name], value)
    initialise_weights({name: parameters[name] for name in fresh}, options.seed)
    for name in fresh:
        # Its parameter may be another one by now: one in fewer bits.
        setattr(model.get_parameter(name), FRESH, True)
    return tuple(sorted({found[name].path for name in stored}))


def initialise_weights(
    parameters: Mapping[str, nn.Parameter], seed: int, std: float = 0.02
) -> None:
    """Random weights keyed by (seed, name): the same under every ZeRO stage and world size."""
    for name, parameter in parameters.items():
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
        set_parameter(parameter, value)
