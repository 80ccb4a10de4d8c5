"""mmtrain evaluate: loss and answers of a trained run, or of its base, on a shard folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.commands.arguments import positive

if TYPE_CHECKING:
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
    from mmtrain.assemble import build_source, data_section
    from mmtrain.errors import ConfigError
    from mmtrain.evaluation.evaluate import write_evaluation
    from mmtrain.training.inference import evaluate_with_progress

    folder = args.data or data_section(ready.config).val
    if folder is None:
        raise ConfigError(["data.val: is missing; name it or give --data"])
    source = build_source(
        ready.config, ready.assembled, folder, args.limit, blank_images=args.blank_images
    )
    run_dir = ready.run_dir or Path(ready.config.run_dir)
    evaluation = evaluate_with_progress(run_dir.name, ready.engine, source, ready.config)
    if ready.engine.world.is_main:
        label = Path(folder).name + ("-base" if args.base else "")
        label += "-blank" if args.blank_images else ""
        out = Path(args.out) if args.out else run_dir / "evaluation" / label
        write_evaluation(out, evaluation)
        print(f"{run_dir}:")
        for name, value in evaluation.metrics.items():
            print(f"{name:20s} {value:.4f}")
        print(f"{len(evaluation.predictions)} predictions in {out / 'predictions.jsonl'}")
