"""A model, ready to answer: of a run, of what it exported, or a base alone."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from mmtrain import distributed
from mmtrain.assemble import Assembled, asked_of, build_model, refuse_preset
from mmtrain.config.deepspeed import find_deepspeed_config, zero_stage
from mmtrain.config.load import load_run_file
from mmtrain.config.schema import GenerationConfig, RunConfig
from mmtrain.data.source import Source
from mmtrain.distributed import World
from mmtrain.errors import MmtrainError
from mmtrain.evaluation.evaluate import Evaluation, evaluate
from mmtrain.evaluation.kept import KeptAnswers
from mmtrain.main_rank import on_main
from mmtrain.models.configuration import readers
from mmtrain.models.weights import read_json
from mmtrain.resolve import adapter_files, is_run_folder, resolve
from mmtrain.tasks.interface import Task
from mmtrain.training.engine import Engine, complete_config
from mmtrain.training.numerics import pin_numerics
from mmtrain.training.progress import Progress
from mmtrain.training.trained import load_trained, trained_files

log = logging.getLogger("mmtrain")
_WHAT_TO_GIVE = "Give a run folder, the adapter/ in it or exported from it, or a run file."


@dataclass(frozen=True)
class Ready:
    """An engine without an optimizer, and what it was built from."""

    config: RunConfig
    engine: Engine
    assembled: Assembled
    run_dir: Path | None
    trained: tuple[Path, ...] = ()  # files of the trained weights; none of a base alone

    @property
    def folder(self) -> Path:
        """Where results belong."""
        return self.run_dir or Path(self.config.run_dir)


def build_ready(config: RunConfig, trained: Path | None, run_dir: Path | None) -> Ready:
    """Build the model on this rank and load what was trained into it, if anything was."""
    refuse_preset(config)
    pin_numerics(config)
    world: World = distributed.initialise()
    settings = complete_config(
        find_deepspeed_config(config.parallel.deepspeed), config.model.dtype, 1, 1, world.size, 0.0
    )
    zero3 = settings if zero_stage(settings) == 3 else None
    if trained is None:
        config = config.model_copy(update={"components": {}})
    assembled = build_model(config, zero3, trains=False)
    files = _load(assembled, trained) if trained is not None else ()
    for parameter in assembled.model.parameters():
        parameter.requires_grad_(False)
    engine = Engine(assembled, world, settings, asked_of(config), None)
    engine.evaluation_mode()
    return Ready(config, engine, assembled, run_dir, files)


def with_weights_of(ready: Ready, path: str, overrides: list[str]) -> Ready:
    """The same base, built once, with what another run trained in the same places."""
    named = _named(Path(path))
    if named is None or named.trained is None:
        raise MmtrainError(f"{path}: nothing was trained there.", _WHAT_TO_GIVE)
    config = load_run_file(named.run_file, overrides)
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
    files = _load(ready.assembled, named.trained)
    return replace(ready, config=config, run_dir=named.run_dir, trained=files)


def _places(config: RunConfig) -> object:
    """All that shapes a built model, and nothing of how it was trained."""
    training_only = {"lr", "weight_decay", "dropout"}
    blocks = {name: block.model_dump() for name, block in config.components.items()}
    for block in blocks.values():
        for name in training_only:
            block.pop(name, None)
    return config.model, blocks


def _load(assembled: Assembled, trained: Path) -> tuple[Path, ...]:
    """Load it; the files read."""
    files = on_main(lambda: trained_files(trained))
    load_trained(assembled, files, f"{trained}: holds other parameters than its run file trains")
    return tuple(files)


@dataclass(frozen=True)
class _Named:
    """What a command's RUN argument names."""

    run_file: Path
    run_dir: Path | None  # None: the run file says it
    trained: Path | None  # None: in the run's folder


def _named(given: Path) -> _Named | None:
    """A run folder, an exported adapter's folder or a run file; None of any other folder."""
    if not given.is_dir():
        return _Named(given, None, None)
    if is_run_folder(given):
        return _Named(given / "run.yaml", given, given)
    run_dir = given.resolve().parent
    if adapter_files(given) and is_run_folder(run_dir):
        return _Named(run_dir / "run.yaml", run_dir, given)
    return None


def ready_from_argument(
    path: str, overrides: Sequence[str], base: bool, task: str | None = None
) -> Ready:
    """What a command's RUN argument means: what was trained, or a base.

    A base's own folder needs no run file; `task` is then what it is asked.
    """
    given = Path(path)
    named = _named(given)
    if named is None:
        return build_ready(_of_base_alone(given, overrides, task), None, None)
    config = load_run_file(named.run_file, overrides)
    trained = named.trained or Path(config.run_dir)
    return build_ready(config, None if base else trained, named.run_dir)


def _of_base_alone(folder: Path, overrides: Sequence[str], task: str | None) -> RunConfig:
    """A run file for a published model's folder."""
    found = folder / "config.json"
    family = readers().get(read_json(found).get("model_type")) if found.is_file() else None
    if family is None:
        raise MmtrainError(
            f"{folder}: no run folder (no run.yaml there), no adapter/ of one, and no model of a"
            " family that is known here.",
            _WHAT_TO_GIVE,
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-")
    run: dict[str, object] = {
        "name": name[:100] or "base",
        "model": {"family": family, "checkpoint": str(folder)},
    }
    return resolve(run | ({"data": {"task": task}} if task else {}), overrides)


def identity(ready: Ready, source: Source) -> str:
    """All that answers depend on, in one line: those to another are not taken up."""
    files = [*ready.assembled.base_files, *ready.trained]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = ready.config
    facts = {
        "files": stats,
        "model": config.model.model_dump(mode="json"),
        "generation": config.generation.model_dump(mode="json"),
        "parallel": config.parallel.model_dump(mode="json"),
        "ranks": ready.engine.world.size,
        "samples": [source.shards.digest, len(source), source.blank_images],
        "words": [source.template.name, source.encoder.max_length, source.encoder.truncation_side],
        "first": str(source.ask(0)[1]),  # an own template has its words, not its name
        "version": version("mmtrain"),
    }
    return json.dumps(facts, sort_keys=True)


def evaluate_with_progress(
    label: str,
    engine: Engine,
    source: Source,
    task: Task,
    settings: GenerationConfig,
    kept: KeptAnswers | None = None,
) -> Evaluation:
    """Loss and answers on a source as the run file asks for them, under a bar."""
    if engine.world.is_main and settings.max_new_tokens < source.template.answer_tokens:
        log.warning(
            "%s: answers are cut at generation.max_new_tokens %d, and may need %d",
            label,
            settings.max_new_tokens,
            source.template.answer_tokens,
        )
    at_once, first = engine.world.size * settings.batch_size, len(kept.known) if kept else 0
    started_s = time.monotonic()

    def on_chunk(done: int, _: int) -> None:
        rate = (done - first) * at_once / (time.monotonic() - started_s)
        progress.update(done, f"{rate:.1f} samples/s")

    chunks = -(-len(source) // at_once)
    with Progress(label, chunks, engine.world.is_main, first) as progress:
        return evaluate(engine, source, task, settings, on_chunk, kept)
