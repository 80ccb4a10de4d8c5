"""One training run on one rank, from a run file to an exported adapter.

The launcher starts this as a process per rank, Ray calls it in its workers: same entry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from mmtrain import distributed, plugins
from mmtrain.assemble import (
    Assembled,
    asked_of,
    build_model,
    build_source,
    data_section,
    refuse_preset,
)
from mmtrain.config.deepspeed import find_deepspeed_config
from mmtrain.config.load import flatten_run
from mmtrain.config.schema import RunConfig
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Source
from mmtrain.data.stream import Layout, StepStream
from mmtrain.distributed import World
from mmtrain.errors import ConfigError, Terminated
from mmtrain.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from mmtrain.tracking.fields import installed_versions
from mmtrain.training import checkpoint as checkpoints
from mmtrain.training.checkpoint import CheckpointFolder
from mmtrain.training.early_stopping import EarlyStopping
from mmtrain.training.ending import fail, finish, out_of_memory
from mmtrain.training.engine import Engine, complete_config
from mmtrain.training.loop import Loop, RunState, state_for_checkpoint
from mmtrain.training.numerics import pin_numerics
from mmtrain.training.opening import Resume, find_resume, input_digests, open_folder
from mmtrain.training.optim import parameter_groups
from mmtrain.training.progress import Progress, set_up_logging
from mmtrain.training.ranks import on_main
from mmtrain.training.recorder import Recorder
from mmtrain.training.termination import ending_in_order

log = logging.getLogger("mmtrain")
OnValidation = Callable[[int, dict[str, float]], None]


def run_training(
    config: RunConfig, on_validation: OnValidation | None = None, verify_base: bool = False
) -> dict[str, float]:
    """Train as the run file says, or go on from the last good checkpoint; the best metrics."""
    pin_numerics(config)
    world = distributed.initialise()
    with ExitStack() as held:
        run_dir, finished = on_main(lambda: open_folder(config, held))
        if finished is None:
            return _run(config, world, run_dir, on_validation, verify_base)
    if world.is_main:
        print(f"{run_dir} is finished: {finished}. Choose another name to train again.")
    return finished


def _run(
    config: RunConfig,
    world: World,
    run_dir: Path,
    on_validation: OnValidation | None,
    verify_base: bool,
) -> dict[str, float]:
    set_up_logging(run_dir, world.rank)
    recorder: Recorder | None = None

    def give_up(error: BaseException) -> None:
        fail(run_dir, world.rank, recorder, error)

    with ending_in_order(lambda: give_up(Terminated())):
        try:
            recorder = _open_recorder(config, run_dir)
            return _train(config, world, run_dir, recorder, on_validation, verify_base)
        except torch.OutOfMemoryError as error:
            failure = out_of_memory(config, error)
            give_up(failure)
            raise failure from error
        except BaseException as error:
            give_up(error)
            raise


def _open_recorder(config: RunConfig, run_dir: Path) -> Recorder | None:
    opened: list[Recorder] = []
    on_main(lambda: opened.append(Recorder(run_dir, config)))
    return opened[0] if opened else None


def _train(
    config: RunConfig,
    world: World,
    run_dir: Path,
    recorder: Recorder | None,
    on_validation: OnValidation | None,
    verify_base: bool,
) -> dict[str, float]:
    refuse_preset(config)
    data, optim = data_section(config), config.optim
    if data.train is None:
        raise ConfigError(["data.train: is missing; give a folder of training shards"])
    for shards in filter(None, (data.train, data.val)):
        # What is wrong with a folder is known before minutes of loading.
        ShardFolder.open(Path(shards), data.task)
    layout = Layout(world.size, world.rank, optim.micro_batch, optim.global_batch).check()
    settings = complete_config(
        find_deepspeed_config(config.parallel.deepspeed),
        config.model.dtype,
        optim.micro_batch,
        layout.accumulation,
        world.size,
        optim.max_grad_norm,
    )
    zero3 = settings if settings["zero_optimization"]["stage"] == 3 else None
    assembled = build_model(config, zero3)
    if not assembled.trainable.owner:
        raise ConfigError(["components: nothing trains; give a component mode 'full' or 'peft'"])
    train = build_source(config, assembled, data.train, data.limit)
    val = build_source(config, assembled, data.val, data.val_limit) if data.val else None
    inputs = on_main(lambda: input_digests(assembled, train, val, verify_base))
    checkpoint_folder = CheckpointFolder(run_dir, config.checkpoint.keep)
    resume = find_resume(checkpoint_folder, inputs)
    engine, parameters = _build_engine(config, world, assembled, settings, resume)
    stream = StepStream(
        len(train),
        train.example,
        lambda examples: assembled.family.code.collate(examples, assembled.processor),
        layout,
        config.data_seed,
        data.workers,
    )
    loop = _make_loop(config, engine, stream, assembled, parameters, resume, run_dir, val, recorder)
    loop.on_validation = on_validation
    facts = _facts(config, layout, settings, inputs)
    loop.save = lambda: _save(checkpoint_folder, engine, parameters, loop, facts)
    step = resume.state["step"] if resume else 0
    main = cast(Recorder, recorder)  # rank 0 has one
    on_main(lambda: main.start(flatten_run(config), inputs, step))
    loop.run()
    on_main(lambda: finish(config, run_dir, checkpoint_folder, loop, assembled, main))
    return loop.state.best_metrics


def _build_engine(
    config: RunConfig,
    world: World,
    assembled: Assembled,
    settings: Mapping[str, Any],
    resume: Resume | None,
) -> tuple[Engine, dict[str, torch.nn.Parameter]]:
    parameters = assembled.trained_parameters()
    if resume is not None:
        checkpoints.load_weights_into_model(resume.folder, parameters)
    optim = config.optim
    groups = parameter_groups(parameters, assembled.trainable.owner, config.components, optim)
    engine = Engine(
        assembled.family,
        assembled.model,
        assembled.processor,
        world,
        settings,
        asked_of(config),
        groups,
        optim.betas,
        optim.eps,
    )
    if resume is not None:
        step = int(resume.state["step"])
        checkpoints.load_optimizer_state(resume.folder, engine, parameters, step)
    return engine, parameters


def _make_loop(
    config: RunConfig,
    engine: Engine,
    stream: StepStream,
    assembled: Assembled,
    parameters: dict[str, torch.nn.Parameter],
    resume: Resume | None,
    run_dir: Path,
    val: Source | None,
    recorder: Recorder | None,
) -> Loop:
    task = plugins.load("task", data_section(config).task)
    stopping, state = EarlyStopping.of(config.validation, task), RunState()
    if resume is not None:
        stopping.restore(resume.state["early_stopping"])
        state = RunState(
            int(resume.state["step"]),
            resume.state["best_metrics"],
            bool(resume.state["stopped_early"]),
        )
    record = recorder.record if recorder is not None else lambda step, epoch, metrics: None
    return Loop(
        config=config,
        engine=engine,
        stream=stream,
        parameters=parameters,
        owner=assembled.trainable.owner,
        stopping=stopping,
        state=state,
        validate=_validator(config, engine, val) if val is not None else None,
        keep_best=partial(_keep_best, run_dir),
        record=record,
        save=lambda: None,
        on_validation=None,
    )


def _keep_best(run_dir: Path, evaluation: Evaluation) -> None:
    """The answers that belong to the checkpoint that is exported in the end."""
    on_main(lambda: write_evaluation(run_dir / "evaluation" / "val", evaluation))


def _validator(config: RunConfig, engine: Engine, val: Source) -> Callable[[int], Evaluation]:
    data = data_section(config)
    task = plugins.load("task", data.task)
    template = data.template or next(iter(task.templates))

    def validate(step: int) -> Evaluation:
        chunks = -(-len(val) // (engine.world.size * config.generation.batch_size))
        with Progress("validate", chunks, engine.world.is_main) as progress:
            evaluation = evaluate(
                engine,
                val,
                task,
                template,
                config.generation,
                lambda done, total: progress.update(done),
            )
        if engine.world.is_main:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
            log.info("step %d: validation %s", step, shown)
        return evaluation

    return validate


def _facts(
    config: RunConfig,
    layout: Layout,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "layout": {
            "world_size": layout.world_size,
            "micro_batch": layout.micro_batch,
            "accumulation": layout.accumulation,
            "zero_stage": settings["zero_optimization"]["stage"],
            "threads": torch.get_num_threads(),
        },
        "versions": installed_versions(),
        "inputs": dict(inputs),
    }


def _save(
    folder: CheckpointFolder,
    engine: Engine,
    parameters: Mapping[str, torch.nn.Parameter],
    loop: Loop,
    facts: Mapping[str, Any],
) -> None:
    if distributed.is_main() and folder.path(loop.state.step).exists():
        log.info("checkpoint step-%d is written again", loop.state.step)
    state = state_for_checkpoint(loop, dict(facts))
    folder.save(engine, parameters, state, loop.stopping.best_step)
