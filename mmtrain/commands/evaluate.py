"""mmtrain evaluate: loss and answers of trained runs, or of a base, on shard folders."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.commands.arguments import positive

if TYPE_CHECKING:
    from mmtrain.evaluation.evaluate import Evaluation
    from mmtrain.evaluation.kept import KeptAnswers
    from mmtrain.tasks.interface import Task
    from mmtrain.training.inference import Ready

HELP = "score runs (or a base) on shard folders"
_EXAMPLES = """examples:
  mmtrain evaluate runs/r64 --data shards/scienceqa/test
  mmtrain evaluate runs/lr1 runs/lr2 runs/lr3         one base, three adapters
  mmtrain evaluate runs/r64 --data shards/okvqa/val --data shards/vizwiz/val --every-checkpoint
  mmtrain evaluate run.yaml --base                    the unadapted base model
  mmtrain evaluate /data/llava-1.5-7b-hf --data shards/mme/test         the same, no run file
  mmtrain evaluate adapters/r64/adapter --data shards/mme/test          exported, or of a run
  torchrun --nproc-per-node 8 -m mmtrain evaluate runs/r64              on eight cards
  mmtrain evaluate runs/r64 --blank-images            must fall to chance"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run", help="run folder, adapter/ of a run, run file, or folder of a base model"
    )
    parser.add_argument(
        "more",
        nargs="*",
        metavar="RUN | key=value",
        help="further runs that adapt the same base in the same places, which is loaded once;"
        " dotted overrides",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR",
        help="shard folder, repeatable, of any task; default: what the run validates on",
    )
    parser.add_argument(
        "--every-checkpoint", action="store_true", help="not the best alone: all that are kept"
    )
    parser.add_argument("--base", action="store_true", help="the base model, nothing trained")
    parser.add_argument("--blank-images", action="store_true", help="replace images by grey ones")
    parser.add_argument("--limit", type=positive, help="only the first N samples")
    parser.add_argument(
        "--out", help="folder of the result; default: evaluation/ in the run folder"
    )


@dataclass(frozen=True)
class Asked:
    """A folder to evaluate on."""

    label: str
    folder: str
    task: Task


@dataclass(frozen=True)
class Scored:
    """One cell of the table: whose answers, on what, how good."""

    who: str
    label: str
    metric: str
    value: float


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the metrics, of every run on the same base."""
    from mmtrain import distributed
    from mmtrain.data.shards import ShardFolder
    from mmtrain.errors import MmtrainError
    from mmtrain.training.inference import ready_from_argument, with_weights_of

    overrides = [text for text in args.more if "=" in text]
    others = [text for text in args.more if "=" not in text]
    if args.base and (others or args.every_checkpoint):
        raise MmtrainError("--base is nothing trained.", "Leave it out, or the runs beside it.")
    names = [Path(one).resolve().name for one in (args.run, *others)]
    if args.out and len(set(names)) < len(names):
        raise MmtrainError("two runs have one name.", "Leave --out away, or evaluate one by one.")
    # A missing folder is known before minutes of loading.
    opened = [ShardFolder.open(folder) for folder in args.data]
    task = opened[0].manifest.task if opened else None
    ready = ready_from_argument(args.run, overrides, args.base, task)
    kept: list[KeptAnswers] = []  # until all is done: a killed command goes on where it stopped
    scored = evaluate_all(args, ready, kept)
    for other in others:
        ready = with_weights_of(ready, other, overrides)
        scored += evaluate_all(args, ready, kept)
    for one in kept:
        one.remove()
    if ready.engine.world.is_main and len(scored) > 1:
        print_table(scored)
    distributed.shut_down()
    return 0


def evaluate_all(
    args: argparse.Namespace, ready: Ready, kept: list[KeptAnswers] | None = None
) -> list[Scored]:
    """Every checkpoint asked for, on every folder; `kept` takes what a killed command left."""
    from mmtrain.errors import ConfigError
    from mmtrain.main_rank import on_main

    asked = list(_asked(args, ready))
    labels = [one.label for one in asked]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError([f"--data: two folders would be kept as '{twice}'; evaluate one by one"])
    if not asked:
        raise ConfigError(["data.val: is missing; name it or give --data"])
    run_dir = ready.folder
    scored = []
    for step, weights in _checkpoints(args, ready, run_dir):
        who = run_dir.name + ("" if step is None else f" step {step}")
        for one in asked:
            label = one.label + ("-base" if args.base else "")
            label += "-blank" if args.blank_images else ""
            label += "" if step is None else f"-step-{step}"
            alone = len(asked) == 1 and step is None
            place = _place(args, run_dir, label, alone)
            evaluation = _evaluation(args, replace(ready, trained=weights), one, place, kept)
            metric = one.task.primary_metric.name
            scored.append(Scored(who, one.label, metric, evaluation.metrics[metric]))
            # What fails on rank 0 alone would leave the others waiting in the next collective.
            on_main(partial(_keep, who, evaluation, place))
    return scored


def _place(args: argparse.Namespace, run_dir: Path, label: str, alone: bool) -> Path:
    """Where a result goes: in the run's folder, or where it was asked for."""
    if not args.out:
        return run_dir / "evaluation" / label
    if any("=" not in text for text in args.more):
        return Path(args.out) / run_dir.name / label
    return Path(args.out) if alone else Path(args.out) / label


def _asked(args: argparse.Namespace, ready: Ready) -> Iterator[Asked]:
    """The folders that were given, or what validates each data set of the run."""
    from mmtrain import plugins
    from mmtrain.assemble import data_section, part_with

    data = data_section(ready.config)
    for folder in args.data:
        path = Path(folder)
        task = part_with(data, folder)[1].task
        own = len(args.data) == 1 and task in (part.task for part in data.parts.values())
        # What another data set is answered with is not kept as the run's own.
        label = path.name if own else f"{path.resolve().parent.name}-{path.name}"
        yield Asked(label, folder, plugins.load("task", task))
    for name, part in data.parts.items() if not args.data else ():
        if part.val:
            label = f"val-{name}" if name else Path(part.val).name
            yield Asked(label, part.val, plugins.load("task", part.task))


def _checkpoints(
    args: argparse.Namespace, ready: Ready, run_dir: Path
) -> Iterator[tuple[int | None, tuple[Path, ...]]]:
    """The steps to evaluate, each loaded when it is its turn; None: what is loaded already."""
    from mmtrain.errors import CheckpointError
    from mmtrain.main_rank import on_main
    from mmtrain.training.checkpoint import WEIGHTS, CheckpointFolder, find_damage
    from mmtrain.training.trained import load_trained

    if not args.every_checkpoint:
        yield None, ready.trained
        return
    folder = CheckpointFolder(run_dir, keep=1)
    steps = on_main(
        lambda: [step for step in sorted(folder.steps()) if not find_damage(folder.path(step))]
    )
    if not steps:
        raise CheckpointError(f"{run_dir}: no intact checkpoint.", "Leave out --every-checkpoint.")
    for step in steps:
        file = folder.path(step) / WEIGHTS
        load_trained(ready.assembled, [file], f"{file.parent}: is not this run's")
        yield step, (file,)


def _evaluation(
    args: argparse.Namespace,
    ready: Ready,
    asked: Asked,
    place: Path,
    kept: list[KeptAnswers] | None,
) -> Evaluation:
    from mmtrain.assemble import build_source
    from mmtrain.evaluation.kept import KeptAnswers
    from mmtrain.training.inference import evaluate_with_progress, identity

    source = build_source(
        ready.config, ready.assembled, asked.folder, args.limit, blank_images=args.blank_images
    )
    mine = None
    if kept is not None:
        rank = ready.engine.world.rank
        mine = KeptAnswers.open(place / ".answered", identity(ready, source), rank)
        kept.append(mine)
    label = f"{ready.folder.name} {place.name}"
    settings = ready.config.generation
    return evaluate_with_progress(label, ready.engine, source, asked.task, settings, mine)


def _keep(who: str, evaluation: Evaluation, out: Path) -> None:
    """Write it, and print every metric; of means over the samples, how sure they are."""
    from mmtrain.evaluation.evaluate import write_evaluation
    from mmtrain.evaluation.uncertainty import PERCENT, interval, is_mean

    write_evaluation(out, evaluation)
    scores = [one.score for one in evaluation.predictions]
    print(f"{who}:")
    for name, value in evaluation.metrics.items():
        line = f"{name:20s} {value:.4f}"
        if name != "loss" and is_mean(value, scores):
            found = interval(scores)
            line += f"  ({found.low:.4f} to {found.high:.4f}, {PERCENT} %)"
        print(line)
    print(f"{len(evaluation.predictions)} predictions in {out / 'predictions.jsonl'}")


def print_table(scored: Sequence[Scored]) -> None:
    """Runs and their checkpoints down, folders across."""
    from rich.console import Console
    from rich.table import Table

    columns = dict.fromkeys((one.label, one.metric) for one in scored)
    table = Table("run", *(f"{label} {metric}" for label, metric in columns))
    for who in dict.fromkeys(one.who for one in scored):
        cells = {(one.label, one.metric): one.value for one in scored if one.who == who}
        table.add_row(who, *(f"{cells[c]:.4f}" if c in cells else "" for c in columns))
    Console().print(table)
