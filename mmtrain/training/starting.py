"""What training starts from: the newest good checkpoint, else `init_from`, else the base alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.assemble import Assembled, base_digests
from mmtrain.config.schema import RunConfig
from mmtrain.data.source import Source
from mmtrain.errors import CheckpointError
from mmtrain.main_rank import on_main
from mmtrain.training import checkpoint as checkpoints
from mmtrain.training.checkpoint import (
    MOMENTS,
    WEIGHTS,
    CheckpointFolder,
    StoredState,
    read_state_file,
)
from mmtrain.training.engine import Engine, Parameters
from mmtrain.training.run_folder import BASE_FILE, check_inputs
from mmtrain.training.tensor_file import Places
from mmtrain.training.trained import trained_files, trained_places
from mmtrain.training.trainee import Trainee

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Start:
    """Trained weights to begin with, read by rank 0; of a resume, moments and their step too."""

    weights: Places
    moments: Places = field(default_factory=dict)
    step: int = 0

    def fill_optimizer(self, engine: Engine, parameters: Parameters) -> None:
        """Set fp32 weights, which the model has rounded, and what the optimizer knew."""
        if self.moments:
            engine.prepare_moments(self.step)
        for key, value in checkpoints.each_tensor(self.weights, engine.world.device):
            engine.set_state(parameters[key], None, value)
        for key, value in checkpoints.each_tensor(self.moments, engine.world.device):
            name, _, moment = key.rpartition(".")
            engine.set_state(parameters[name], moment, value)


def find_start(trainee: Trainee, assembled: Assembled, initial: Sequence[Path]) -> Start | None:
    """Where the trainee goes on or begins, on every rank; None is at the base alone."""
    weights, moments = checkpoints.tensor_shapes(trainee.parameters)
    state = find_resume(trainee.checkpoints, trainee.facts["inputs"])
    if any(one.added.batch_coupled for one in assembled.trainable.attachments):
        _warn_of_coupling(trainee.facts["layout"], None if state is None else state["layout"])
    if state is None:
        if not initial:
            return None
        log.info("starting from the trained weights of %s", trainee.config.init_from)
        remedy = (
            "train the same components with the same methods and sizes, or fold it into the base"
            " (mmtrain export) and give that as model.checkpoint"
        )
        source = f"init_from: {trainee.config.init_from} does not fit; {remedy}"
        return Start(on_main(lambda: trained_places(initial, weights, assembled.trainable, source)))
    if initial:
        log.info("not from init_from, where this run began: its own checkpoint knows more")
    trainee.restore(state)
    folder = trainee.checkpoints.path(trainee.state.step)
    return Start(
        on_main(lambda: checkpoints.places_in(folder / WEIGHTS, weights)),
        on_main(lambda: checkpoints.places_in(folder / MOMENTS, moments)),
        trainee.state.step,
    )


def _warn_of_coupling(layout: Mapping[str, int], before: Mapping[str, int] | None) -> None:
    """A method that compares the samples of a micro-batch learns otherwise from another cut."""
    if layout["micro_batch"] == 1:
        log.warning(
            "a method here compares the samples of a micro-batch, and optim.micro_batch is 1:"
            " there is nothing to compare"
        )
    cut = ("world_size", "micro_batch", "accumulation")
    if before is not None and any(before[key] != layout[key] for key in cut):
        log.warning(
            "a method here compares the samples of a micro-batch, and these are cut otherwise than"
            " before this resume: what is learnt from here on differs"
        )


def find_resume(folder: CheckpointFolder, inputs: Mapping[str, str]) -> StoredState | None:
    """The newest good checkpoint's state, on every rank; what lies beyond it is set aside."""
    state = on_main(lambda: _newest_state(folder, inputs))
    if state is not None:
        log.info("resuming after step %d", state["step"])
    return state


def _newest_state(folder: CheckpointFolder, inputs: Mapping[str, str]) -> StoredState | None:
    path = folder.newest_good()
    state = None if path is None else read_state_file(path)
    if state is not None:
        check_inputs(state["inputs"], inputs)
    elif folder.steps():
        log.warning("no checkpoint is good: training starts again from step 0")
    folder.set_aside_beyond(-1 if state is None else state["step"])
    return state


def input_digests(
    assembled: Assembled,
    sources: Mapping[str, Mapping[str, Source]],
    initial: Sequence[Path],
    verify_base: bool,
) -> dict[str, str]:
    """What a resume must find unchanged, by name. Rank 0 only: it reads files."""
    base = base_digests(assembled.base_files, verify_base)
    digests = {"base": base.pop("weights")}
    for split, parts in sources.items():
        for name, source in parts.items():
            digests[".".join(filter(None, ("data", name, split)))] = source.shards.digest
    if initial:
        digests["init_from"] = base_digests(initial, verify_base)["weights"]
    return digests | {f"{BASE_FILE}{name}": digest for name, digest in base.items()}


def initial_files(config: RunConfig) -> list[Path]:
    """The weight files that `init_from` names. Rank 0 only."""
    if config.init_from is None:
        return []
    files = trained_files(Path(config.init_from).absolute())
    if not files:
        raise CheckpointError(
            f"init_from: {config.init_from} is neither a run folder nor an adapter folder.",
            "Give the folder of a trained run, or the adapter/ in it.",
        )
    return files
