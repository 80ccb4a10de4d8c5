"""Saving and resuming what trains: fp32 masters and moments by parameter name.

A checkpoint knows neither world size nor ZeRO stage. It is written beside, synced, read back and
renamed; one that does not match its checksums is passed over for the one before it, and said so.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open

from mmtrain import distributed
from mmtrain.errors import CheckpointError, TrainingError
from mmtrain.files import file_sha256, sync_folder, write_json
from mmtrain.main_rank import worded
from mmtrain.training.early_stopping import StoppingState
from mmtrain.training.engine import Engine, Parameters
from mmtrain.training.tensor_file import Place, Places, Shapes, TensorFileWriter, read_shapes

log = logging.getLogger("mmtrain")
WEIGHTS, MOMENTS, STATE, SUMS = (
    "trainable.safetensors",
    "moments.safetensors",
    "state.json",
    "sha256.json",
)
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)


class Facts(TypedDict):
    """What a checkpoint also says of its run."""

    seed: int
    layout: dict[str, int]
    versions: dict[str, str]
    inputs: dict[str, str]  # digests of what a resume must find unchanged, by name


class StoredState(Facts):
    """state.json: all a resume needs, and all a person would ask."""

    step: int
    position: int
    epoch: float
    early_stopping: StoppingState
    best_metrics: dict[str, float]
    stopped_early: bool
    bad_samples: int


class CheckpointFolder:
    """The `checkpoints/` of one run."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        found = (_STEP_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step}"

    def save(self, engine: Engine, parameters: Parameters, state: StoredState) -> None:
        """Write one checkpoint. Every rank takes part; a failure stops all of them."""
        step = state["step"]
        target = self.path(step)
        temporary = self.folder / f".step-{step}.writing"
        fault = ""
        if distributed.is_main():
            fault = _guarded(lambda: _start(temporary))
        fault = _write_tensors(engine, parameters, temporary, fault)
        if distributed.is_main() and not fault:
            fault = _guarded(lambda: self._finish(temporary, target, state))
        fault = distributed.from_main(fault)
        if fault:
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {fault}.",
                "Earlier checkpoints are intact: make room or rights there, and run the same"
                " command again to go on from the last one.",
            )
        if distributed.is_main():
            self._prune(state["early_stopping"]["best_step"])

    def _finish(self, temporary: Path, target: Path, state: StoredState) -> None:
        write_json(temporary / STATE, state, sync=True)
        sums = {name: file_sha256(temporary / name) for name in (WEIGHTS, MOMENTS, STATE)}
        write_json(temporary / SUMS, sums, sync=True)
        sync_folder(temporary)
        problem = find_damage(temporary)
        if problem:
            raise OSError(f"what was read back differs: {problem}")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(self.folder)

    def _prune(self, best_step: int) -> None:
        for step in self.steps()[self.keep :]:
            if step != best_step:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def newest_good(self) -> Path | None:
        """The newest intact checkpoint; damaged ones are named and passed over. Rank 0 only."""
        for step in self.steps():
            problem = find_damage(self.path(step))
            if problem is None and read_state_file(self.path(step))["step"] != step:
                problem = f"{STATE} is of another step"
            if problem is None:
                return self.path(step)
            log.warning("checkpoint step-%d is not used: %s; trying the one before", step, problem)
        return None

    def set_aside_beyond(self, step: int) -> None:
        """Put what could not be used out of the way: it would count as the newest for ever."""
        for later in (found for found in self.steps() if found > step):
            aside = self.folder / f"damaged-step-{later}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(later).rename(aside)
            log.warning("checkpoint step-%d is set aside as %s", later, aside)


def _start(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        for name in (WEIGHTS, MOMENTS, STATE):
            if file_sha256(folder / name) != sums[name]:
                return f"{name} does not match its checksum (cut short or altered)"
        for name in (WEIGHTS, MOMENTS):
            safe_open(str(folder / name), framework="pt", device="cpu")
        wrong = _unusable(read_state_file(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        return f"not readable ({type(error).__name__}: {error})"
    return f"{STATE} holds no usable {', '.join(wrong)}" if wrong else None


def _unusable(state: StoredState) -> list[str]:
    """Keys of state.json that training cannot go on from: its sum may fit a stranger."""
    stopping, number = state["early_stopping"], int | float
    usable = {
        "step": isinstance(state["step"], int),
        "inputs": all(isinstance(digest, str) for digest in dict(state["inputs"]).values()),
        "early_stopping": isinstance(stopping["best_value"], number | None)
        and isinstance(stopping["best_step"], int)
        and isinstance(stopping["since_best"], int),
        "best_metrics": all(isinstance(v, number) for v in dict(state["best_metrics"]).values()),
        "stopped_early": isinstance(state["stopped_early"], bool),
        "bad_samples": type(state.get("bad_samples", 0)) is int,
    }
    return [key for key, good in usable.items() if not good]


def _guarded(action: Callable[[], None]) -> str:
    """Run a file action; its failure, whatever it is, as text: other ranks must be told."""
    try:
        action()
    except Exception as error:
        return _told(error)
    return ""


def _told(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else worded(error)


def _write_tensors(engine: Engine, parameters: Parameters, folder: Path, fault: str) -> str:
    """Gather and write tensor by tensor. Gathering goes on after a failed write: others wait."""
    weights, moments = tensor_shapes(parameters)
    for file_name, shapes, tensors in (
        (WEIGHTS, weights, engine.masters(parameters)),
        (MOMENTS, moments, engine.moments(parameters)),
    ):
        writer: TensorFileWriter | None = None
        for number, (name, value) in enumerate(tensors, start=1):
            if not distributed.is_main() or fault:
                continue
            try:
                writer = writer or TensorFileWriter(folder / file_name, shapes)
                writer.write(name, value)
                if number == len(shapes):
                    writer.close()
            except Exception as error:
                fault = _told(error)
    return fault


def tensor_shapes(parameters: Parameters) -> tuple[Shapes, Shapes]:
    """Names and shapes of the weights' file, and of the moments'."""
    weights = {name: distributed.full_shape(p) for name, p in parameters.items()}
    return weights, {f"{n}.{key}": s for n, s in weights.items() for key in distributed.MOMENTS}


def read_state_file(folder: Path) -> StoredState:
    """state.json of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def places_in(path: Path, shapes: Shapes) -> Places:
    """Where a checkpoint's file has these tensors; an error where it holds others. Rank 0 only."""
    other = sorted(name for name, _ in read_shapes(path).items() ^ shapes.items())
    if other:
        raise CheckpointError(
            f"checkpoint {path.parent}: holds other parameters than this run trains, e.g."
            f" {other[0]}.",
            "Keep the components as they were trained, or give the run another output_dir.",
        )
    return {name: Place(path, name, shape) for name, shape in shapes.items()}


def each_tensor(places: Places, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors on every rank, one at a time; rank 0 alone reads."""
    files = {place.path for place in places.values()} if distributed.is_main() else ()
    readers = {path: safe_open(str(path), framework="pt", device="cpu") for path in files}
    for name, (path, key, shape) in places.items():
        value = readers[path].get_tensor(key) if readers else None
        yield name, distributed.broadcast_tensor(value, shape, device)


def load_weights(places: Places, parameters: Parameters) -> None:
    """Set working weights, before the engine exists."""
    for name, value in each_tensor(places, next(iter(parameters.values())).device):
        distributed.write_parameter(parameters[name], value)
