"""mmtrain train: one run on this machine, or one rank of it under a launcher."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmtrain.config.schema import RunConfig

HELP = "train a run file (one rank per process; see `mmtrain launch` for several)"
_EXAMPLES = """examples:
  mmtrain train run.yaml
  mmtrain train run.yaml optim.lr=1e-4 components.llm.r=64 name=r64
  mmtrain train run.yaml --max-steps 5          a quick look: five steps, no tracker
  mmtrain train run.yaml --overfit 16           learn 16 samples by heart: the model can learn
  mmtrain launch run.yaml --ranks 8             all GPUs of this machine
The same command again goes on from the last good checkpoint."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_file", help="YAML run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    quick = parser.add_mutually_exclusive_group()
    quick.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    quick.add_argument("--overfit", type=int, metavar="N", help="train and validate on N samples")


def run(args: argparse.Namespace) -> int:
    """Train."""
    from mmtrain.build import resolve
    from mmtrain.training.run import run_training

    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    config = resolve(args.run_file, args.overrides, world_size)
    if args.max_steps or args.overfit:
        config = resolve(args.run_file, [*args.overrides, *_quick(args, config)], world_size)
    run_training(config)
    if int(os.environ.get("RANK") or 0) == 0:
        from mmtrain.report.plot import plot_run

        print(f"plot: {plot_run(Path(config.run_dir))}")
    return 0


def _quick(args: argparse.Namespace, config: RunConfig) -> list[str]:
    """Overrides of a quick look: its own folder, no tracker."""
    name, data, optim = config.name, config.data, config.optim
    if args.max_steps:
        return [
            f"name={name}-quick",
            f"output_dir={config.run_dir}-quick",
            "tracking.uri=none",
            "optim.epochs=null",
            f"optim.max_steps={args.max_steps}",
        ]
    train = data.train if data else None
    batch = min(args.overfit, optim.micro_batch)
    return [
        f"name={name}-overfit",
        f"output_dir={config.run_dir}-overfit",
        "tracking.uri=none",
        f"data.limit={args.overfit}",
        f"data.val={train}",
        f"data.val_limit={args.overfit}",
        "optim.epochs=null",
        "optim.max_steps=150",
        "optim.schedule=constant",
        "optim.warmup_ratio=null",
        "optim.warmup_steps=null",
        f"optim.micro_batch={batch}",
        f"optim.global_batch={batch * int(os.environ.get('WORLD_SIZE') or 1)}",
        "validate.every=50",
    ]
