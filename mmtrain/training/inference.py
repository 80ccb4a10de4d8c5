"""A run's model, ready to answer: from its best checkpoint, or the base alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mmtrain import distributed, plugins
from mmtrain.assemble import Assembled, asked_of, build_model, data_section, refuse_preset
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.load import load_run_file
from mmtrain.config.schema import RunConfig
from mmtrain.data.source import Source
from mmtrain.distributed import World
from mmtrain.errors import CheckpointError, MmtrainError
from mmtrain.evaluation.evaluate import Evaluation, evaluate
from mmtrain.main_rank import on_main
from mmtrain.resolve import is_run_folder
from mmtrain.training import checkpoint as checkpoints
from mmtrain.training.checkpoint import WEIGHTS, CheckpointFolder
from mmtrain.training.engine import Engine, complete_config
from mmtrain.training.numerics import pin_numerics
from mmtrain.training.progress import Progress
from mmtrain.training.run_folder import read_status

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Ready:
    """An engine without an optimizer, and what it was built from."""

    config: RunConfig
    engine: Engine
    assembled: Assembled
    run_dir: Path | None


def chosen_checkpoint(run_dir: Path) -> Path:
    """The best intact checkpoint of a run, else the newest intact one."""
    folder = CheckpointFolder(run_dir, keep=1)
    best = read_status(run_dir).get("best_step")
    damage = None if best is None else checkpoints.find_damage(folder.path(best))
    if best is not None and damage is None:
        return folder.path(best)
    if damage is not None:
        log.warning(
            "the best checkpoint, step-%s, is not used: %s; trying the newest", best, damage
        )
    newest = folder.newest_good()
    if newest is None:
        raise CheckpointError(
            f"{run_dir}: no intact checkpoint.",
            "Train it first; evaluate and predict take --base for the base.",
        )
    return newest


def build_ready(config: RunConfig, checkpoint: Path | None, run_dir: Path | None) -> Ready:
    """Build the model on this rank and load trained weights into it."""
    refuse_preset(config)
    pin_numerics(config)
    world: World = distributed.initialise()
    settings = complete_config(
        find_deepspeed_config(config.parallel.deepspeed), config.model.dtype, 1, 1, world.size, 0.0
    )
    zero3 = settings if zero_stage(settings) == 3 else None
    if checkpoint is None:
        config = config.model_copy(update={"components": {}})
    assembled = build_model(config, zero3, trains=False)
    if checkpoint is not None:
        parameters = assembled.trained_parameters()
        shapes = checkpoints.tensor_shapes(parameters)[0]
        places = on_main(lambda: checkpoints.places_in(checkpoint / WEIGHTS, shapes))
        checkpoints.load_weights(places, parameters)
    for parameter in assembled.model.parameters():
        parameter.requires_grad_(False)
    engine = Engine(assembled, world, settings, asked_of(config), None)
    engine.evaluation_mode()
    return Ready(config, engine, assembled, run_dir)


def ready_from_argument(path: str, overrides: list[str], base: bool) -> Ready:
    """What a command's RUN argument means: a run folder's best model, or a file's base."""
    given = Path(path)
    run_dir = given if given.is_dir() else None
    if run_dir is not None and not is_run_folder(run_dir):
        raise MmtrainError(f"{given}: no run folder (no run.yaml there).", "Give a run folder.")
    config = load_run_file(given if run_dir is None else run_dir / "run.yaml", overrides)
    checkpoint = None if base else chosen_checkpoint(run_dir or Path(config.run_dir))
    return build_ready(config, checkpoint, run_dir)


def evaluate_with_progress(
    label: str, engine: Engine, source: Source, config: RunConfig
) -> Evaluation:
    """Loss and answers on a source as the run file asks for them, under a bar."""
    task = plugins.load("task", data_section(config).task)
    chunks = -(-len(source) // (engine.world.size * config.generation.batch_size))
    with Progress(label, chunks, engine.world.is_main) as progress:
        return evaluate(
            engine, source, task, config.generation, lambda done, _: progress.update(done)
        )
