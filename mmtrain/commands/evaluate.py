"""mmtrain evaluate: loss and answers of a trained run, or of its base, on a shard folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.commands.arguments import positive

if TYPE_CHECKING:
    from mmtrain.evaluation.evaluate import Evaluation
    from mmtrain.training.inference import Ready

HELP = "score a run (or its base) on a shard folder"
_EXAMPLES = """examples:
  mmtrain evaluate runs/r64 --data shards/scienceqa/test
  mmtrain evaluate runs/lr1 runs/lr2 runs/lr3         one base, three adapters
  mmtrain evaluate run.yaml --base                    the unadapted base model
  mmtrain evaluate runs/r64 --blank-images            must fall to chance"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="run folder, or run file")
    parser.add_argument(
        "more",
        nargs="*",
        metavar="RUN | key=value",
        help="further runs that adapt the same base in the same places, which is loaded once;"
        " dotted overrides",
    )
    parser.add_argument("--data", help="shard folder; default: the run's data.val")
    parser.add_argument("--base", action="store_true", help="the base model, nothing trained")
    parser.add_argument("--blank-images", action="store_true", help="replace images by grey ones")
    parser.add_argument("--limit", type=positive, help="only the first N samples")
    parser.add_argument(
        "--out", help="folder of the result; default: evaluation/ in the run folder"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the metrics, of every run on the same base."""
    from mmtrain import distributed
    from mmtrain.data.shards import ShardFolder
    from mmtrain.errors import MmtrainError
    from mmtrain.training.inference import ready_from_argument, with_weights_of

    overrides = [text for text in args.more if "=" in text]
    others = [text for text in args.more if "=" not in text]
    if others and (args.out or args.base):
        raise MmtrainError(
            "--out and --base are for one run.", "Leave them out, or evaluate runs one by one."
        )
    if args.data:
        ShardFolder.open(Path(args.data))  # a missing folder is known before minutes of loading
    ready = ready_from_argument(args.run, overrides, args.base)
    _evaluate(args, ready)
    for other in others:
        ready = with_weights_of(ready, other, overrides)
        _evaluate(args, ready)
    distributed.shut_down()
    return 0


def _evaluate(args: argparse.Namespace, ready: Ready) -> None:
    """On the folder that was given, or on what validates each data set of the run."""
    from mmtrain.assemble import data_section, part_with
    from mmtrain.errors import ConfigError

    data = data_section(ready.config)
    if args.data:
        name, part = part_with(data, args.data)
        return _evaluate_on(args, ready, args.data, Path(args.data).name, part.task)
    folders = {name: part for name, part in data.parts.items() if part.val}
    if not folders:
        raise ConfigError(["data.val: is missing; name it or give --data"])
    if len(folders) > 1 and args.out:
        raise ConfigError(
            [f"--out is for one folder, {len(folders)} data sets validate; give --data"]
        )
    for name, part in folders.items():
        label = f"val-{name}" if name else Path(str(part.val)).name
        _evaluate_on(args, ready, str(part.val), label, part.task)


def _evaluate_on(
    args: argparse.Namespace, ready: Ready, folder: str, label: str, task: str
) -> None:
    from mmtrain import plugins
    from mmtrain.assemble import build_source
    from mmtrain.evaluation.evaluate import write_evaluation
    from mmtrain.training.inference import evaluate_with_progress

    source = build_source(
        ready.config, ready.assembled, folder, args.limit, blank_images=args.blank_images
    )
    run_dir = ready.run_dir or Path(ready.config.run_dir)
    settings = ready.config.generation
    evaluation = evaluate_with_progress(
        run_dir.name, ready.engine, source, plugins.load("task", task), settings
    )
    if ready.engine.world.is_main:
        label += "-base" if args.base else ""
        label += "-blank" if args.blank_images else ""
        out = Path(args.out) if args.out else run_dir / "evaluation" / label
        write_evaluation(out, evaluation)
        _print(run_dir, evaluation, out)


def _print(run_dir: Path, evaluation: Evaluation, out: Path) -> None:
    """Every metric; of means over the samples, how sure they are."""
    from mmtrain.evaluation.uncertainty import PERCENT, interval, is_mean

    scores = [one.score for one in evaluation.predictions]
    print(f"{run_dir}:")
    for name, value in evaluation.metrics.items():
        line = f"{name:20s} {value:.4f}"
        if name != "loss" and is_mean(value, scores):
            found = interval(scores)
            line += f"  ({found.low:.4f} to {found.high:.4f}, {PERCENT} %)"
        print(line)
    print(f"{len(evaluation.predictions)} predictions in {out / 'predictions.jsonl'}")
