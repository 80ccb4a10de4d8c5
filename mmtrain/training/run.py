"""One training run on one rank, from a run file to an exported adapter.

The launcher starts this as a process per rank, Ray calls it in its workers: same entry.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from mmtrain.assemble import (
    Assembled,
    asked_of,
    build_model,
    build_sources,
    data_section,
    open_shards,
    refuse_preset,
    shard_cache,
    shares,
    template_for,
)
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.schema import OwnTemplate, RunConfig
from mmtrain.data.ahead import Ahead
from mmtrain.data.lengths import token_lengths
from mmtrain.data.mixture import Mixed, mixture_of
from mmtrain.data.plan import Layout, Planner
from mmtrain.data.stream import StepStream
from mmtrain.data.windows import Windows, windows_for
from mmtrain.distributed import World
from mmtrain.errors import ConfigError
from mmtrain.main_rank import on_main
from mmtrain.planning.census import rehearse
from mmtrain.tracking.fields import installed_versions
from mmtrain.training.checkpoint import Facts, load_weights
from mmtrain.training.engine import Engine, complete_config
from mmtrain.training.loop import Loop, OnValidation
from mmtrain.training.numerics import pin_numerics
from mmtrain.training.progress import Progress
from mmtrain.training.session import Session
from mmtrain.training.starting import find_start, initial_files, input_digests
from mmtrain.training.trainee import Trainee

log = logging.getLogger("mmtrain")


def run_training(
    config: RunConfig, on_validation: OnValidation | None = None, verify_base: bool = False
) -> dict[str, float]:
    """Train as the run file says, or go on from the last good checkpoint; the best metrics."""
    pin_numerics(config)
    with Session.open(config) as session:
        if session.finished is None:
            return _train(session, on_validation, verify_base)
    if session.world.is_main:
        print(
            f"{session.run_dir} is finished: {session.finished}."
            " Choose another name to train again."
        )
    return session.finished


def _train(
    session: Session, on_validation: OnValidation | None, verify_base: bool
) -> dict[str, float]:
    """Open, assemble, resume, loop, finish."""
    config, world = session.config, session.world
    layout, settings, windows = _planned(config, world)
    initial = on_main(lambda: initial_files(config))
    numbers = on_main(lambda: _rehearsed(config))
    assembled = build_model(config, settings if zero_stage(settings) == 3 else None)
    if not assembled.trainable.owner:
        raise ConfigError(["components: nothing trains; give a component mode 'full' or 'peft'"])
    data = data_section(config)
    sources = {split: build_sources(config, assembled, split) for split in ("train", "val")}
    skips = data.on_bad_sample == "skip"
    train = Mixed(tuple(sources["train"].values()), skips)
    inputs = on_main(lambda: input_digests(assembled, sources, initial, verify_base))
    lengths = _lengths(config, train, inputs, world) if data.cut == "balanced" else None
    if any(source.blobs for source in train.parts):
        inputs["data.cache_gib.windows"] = windows.digest if windows else "none"
    mixture = mixture_of(data.parts, [len(source) for source in train.parts], windows)
    planner = Planner(mixture.num_samples, layout, config.data_seed, lengths, mixture)
    collate = partial(assembled.family.code.collate, processor=assembled.processor)
    val = list(sources["val"].values())
    ahead = Ahead.of(planner, mixture, train.parts, val, shard_cache(data))
    stream = StepStream(planner, train.example, collate, data.workers, skips, ahead)
    facts = _facts(config, layout, settings, inputs)
    trainee = Trainee.of(session, assembled, planner.steps_per_epoch, facts)
    engine = _engine(session, assembled, settings, trainee, initial)
    on_main(lambda: trainee.recorder.start(inputs, trainee.state.step, numbers))
    Loop(engine, stream, sources["val"], on_validation).run([trainee])
    on_main(lambda: _finish(session, trainee, assembled))
    return trainee.state.best_metrics


def _planned(config: RunConfig, world: World) -> tuple[Layout, dict[str, object], Windows | None]:
    """How batch and data are cut and the state spread; faults are known before long loading."""
    refuse_preset(config)
    data, optim = data_section(config), config.optim
    for name, part in data.parts.items():
        if part.train is None:
            place = f"data.mix '{name}'" if name else "data.train"
            raise ConfigError([f"{place}: is missing; give a folder of training shards"])
        for shards in filter(None, (part.train, part.val)):
            template_for(part, open_shards(data, shards, part.task))
    cache = shard_cache(data)
    windows = windows_for(shares(data, "train"), shares(data, "val"), cache.max_bytes)
    sizes = (optim.micro_batch, optim.global_batch, optim.micro_tokens)
    layout = Layout(world.size, world.rank, *sizes).check()
    settings = complete_config(
        find_deepspeed_config(config.parallel.deepspeed),
        config.model.dtype,
        optim.micro_batch,
        layout.accumulation,
        world.size,
        optim.max_grad_norm,
    )
    return layout, settings, windows


def _rehearsed(config: RunConfig) -> dict[str, float]:
    """What there is to train, said aloud; methods refuse here what they cannot do."""
    numbers = rehearse(config)
    log.info(
        "%d of %d parameters train; %.3g TFLOPs per sample, counted, %.3g by the papers' formula",
        numbers["trained_params"],
        numbers["total_params"],
        numbers["train_flops_per_sample"] / 1e12,
        numbers["train_flops_per_sample_by_formula"] / 1e12,
    )
    return numbers


def _plain(template: str | OwnTemplate | None) -> object:
    return template.model_dump() if isinstance(template, OwnTemplate) else template


def _lengths(
    config: RunConfig, train: Mixed, inputs: Mapping[str, str], world: World
) -> np.ndarray:
    """Tokens of every training sample, under a bar where they are counted first."""
    data, model = data_section(config), config.model
    identity = {
        "data": [data.max_length, data.truncation_side],
        "parts": [
            [name, part.task, _plain(part.template), len(source)]
            for (name, part), source in zip(data.parts.items(), train.parts, strict=True)
        ],
        "model": [model.family, model.max_pixels, model.grounding_tokens],
        "inputs": {name: digest for name, digest in inputs.items() if name != "base"},
        "version": version("mmtrain"),
    }
    total = -(-len(train) // world.size)
    with Progress("count tokens", total, world.is_main) as progress:
        return token_lengths(train, identity, world, lambda done, _: progress.update(done))


def _engine(
    session: Session,
    assembled: Assembled,
    settings: Mapping[str, object],
    trainee: Trainee,
    initial: Sequence[Path],
) -> Engine:
    """The engine, and the trainee where it goes on or starts from."""
    start = find_start(trainee, assembled, initial)
    if start is not None:
        load_weights(start.weights, trainee.parameters)
    optimizer = trainee.optimizer()
    asked = asked_of(session.config)
    engine = Engine(assembled, session.world, settings, asked, optimizer)
    if start is not None:
        start.fill_optimizer(engine, trainee.parameters)
    return engine


def _facts(
    config: RunConfig, layout: Layout, settings: Mapping[str, object], inputs: dict[str, str]
) -> Facts:
    return {
        "seed": config.seed,
        "layout": {
            "world_size": layout.world_size,
            "micro_batch": layout.micro_batch,
            "accumulation": layout.accumulation,
            "zero_stage": zero_stage(settings),
            "threads": torch.get_num_threads(),
        },
        "versions": installed_versions(),
        "inputs": inputs,
    }


def _finish(session: Session, trainee: Trainee, assembled: Assembled) -> None:
    """Export the best checkpoint and say that the run is finished. Rank 0 only."""
    chosen, exported = trainee.export(assembled)
    answers = session.run_dir / "evaluation" / "val"
    artifacts = [*exported, answers, session.run_dir / "run.yaml"]
    session.finish(trainee.state.best_metrics, chosen, trainee.state.step, artifacts)
