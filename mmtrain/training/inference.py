"""A run's model, ready to answer: from its best checkpoint, or the base alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain import distributed
from mmtrain.assemble import Assembled, asked_of, build_model, refuse_preset
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.load import load_run_file
from mmtrain.config.schema import GenerationConfig, RunConfig
from mmtrain.data.source import Source
from mmtrain.distributed import World
from mmtrain.errors import CheckpointError, MmtrainError
from mmtrain.evaluation.evaluate import Evaluation, evaluate
from mmtrain.main_rank import on_main
from mmtrain.resolve import is_run_folder
from mmtrain.tasks.interface import Task
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
        load_trained(assembled, checkpoint)
    for parameter in assembled.model.parameters():
        parameter.requires_grad_(False)
    engine = Engine(assembled, world, settings, asked_of(config), None)
    engine.evaluation_mode()
    return Ready(config, engine, assembled, run_dir)


def with_weights_of(ready: Ready, path: str, overrides: list[str]) -> Ready:
    """The same base, built once, with what another run trained in the same places."""
    run_dir = Path(path)
    _refuse_other_folder(run_dir)
    config = load_run_file(run_dir / "run.yaml", overrides)
    # What belongs to an adapter and does not train is drawn from the seed.
    drawn = any(
        one.added.stored or one.added.computed for one in ready.assembled.trainable.attachments
    )
    other_draw = drawn and config.seed != ready.config.seed
    if other_draw or _places(config) != _places(ready.config):
        raise MmtrainError(
            f"{path} has another base, or adapts it in other places or sizes than"
            f" {ready.run_dir}: it needs a model of its own.",
            "Evaluate it in a command of its own.",
        )
    load_trained(ready.assembled, chosen_checkpoint(run_dir))
    return replace(ready, config=config, run_dir=run_dir)


def _places(config: RunConfig) -> object:
    """All that shapes a built model, and nothing of how it was trained."""
    training_only = {"lr", "weight_decay", "dropout"}
    blocks = {name: block.model_dump() for name, block in config.components.items()}
    for block in blocks.values():
        for name in training_only:
            block.pop(name, None)
    return config.model, blocks


def load_trained(assembled: Assembled, checkpoint: Path) -> None:
    """A checkpoint's weights into what trains, on every rank."""
    parameters = assembled.trained_parameters()
    shapes = checkpoints.tensor_shapes(parameters)[0]
    places = on_main(lambda: checkpoints.places_in(checkpoint / WEIGHTS, shapes))
    checkpoints.load_weights(places, parameters)


def _refuse_other_folder(folder: Path) -> None:
    if not is_run_folder(folder):
        raise MmtrainError(f"{folder}: no run folder (no run.yaml there).", "Give a run folder.")


def ready_from_argument(path: str, overrides: list[str], base: bool) -> Ready:
    """What a command's RUN argument means: a run folder's best model, or a file's base."""
    given = Path(path)
    run_dir = given if given.is_dir() else None
    if run_dir is not None:
        _refuse_other_folder(run_dir)
    config = load_run_file(given if run_dir is None else run_dir / "run.yaml", overrides)
    checkpoint = None if base else chosen_checkpoint(run_dir or Path(config.run_dir))
    return build_ready(config, checkpoint, run_dir)


def evaluate_with_progress(
    label: str, engine: Engine, source: Source, task: Task, settings: GenerationConfig
) -> Evaluation:
    """Loss and answers on a source as the run file asks for them, under a bar."""
    chunks = -(-len(source) // (engine.world.size * settings.batch_size))
    with Progress(label, chunks, engine.world.is_main) as progress:
        return evaluate(engine, source, task, settings, lambda done, _: progress.update(done))
