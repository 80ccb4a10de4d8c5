"""mmtrain train: one run on this machine, or one rank of it under a launcher."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path

from mmtrain.commands.arguments import positive
from mmtrain.config.load import load_run_file
from mmtrain.config.schema import DataConfig, RunConfig
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.ranks import place_of
from mmtrain.tracking.uri import DISABLED
from mmtrain.training.run_folder import exclusive

log = logging.getLogger("mmtrain")

HELP = "train a run file (one rank per process; see `mmtrain launch` for several)"
_EXAMPLES = """examples:
  mmtrain train run.yaml
  mmtrain train run.yaml optim.lr=1e-4 components.llm.r=64 name=r64
  mmtrain train run.yaml --max-steps 5          a quick look: five steps, no tracker
  mmtrain train run.yaml --overfit 16           learn 16 samples by heart: the model can learn
  mmtrain launch run.yaml --ranks 8             all GPUs of this machine
The same command again goes on from the last good checkpoint;
a quick look starts afresh in its own folder, runs/<name>-quick or -overfit."""
_QUICK_VALIDATION_SAMPLES = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_file", help="YAML run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument(
        "--verify-base", action="store_true", help="hash the base's files again, cached or not"
    )
    quick = parser.add_mutually_exclusive_group()
    quick.add_argument(
        "--max-steps", type=positive, metavar="N", help="stop after N optimizer steps"
    )
    quick.add_argument(
        "--overfit", type=positive, metavar="N", help="train and validate on N samples"
    )


def run(args: argparse.Namespace) -> int:
    """Train."""
    from mmtrain import distributed
    from mmtrain.training.run import run_training

    place = place_of(os.environ)
    is_main = place.rank == 0
    config = resolved(args, place.size)
    if is_main and (args.max_steps or args.overfit):
        # Before rank 0 joins the group: the others wait for it there, then touch the folder.
        remove_earlier_look(config)
    try:
        run_training(config, verify_base=args.verify_base)
    finally:
        if is_main:
            _plot(Path(config.run_dir))
    distributed.shut_down()
    return 0


def resolved(args: argparse.Namespace, world_size: int) -> RunConfig:
    """What the arguments ask for: the run of the file, or a quick look at it."""
    from mmtrain.resolve import resolve

    config = resolve(args.run_file, args.overrides, world_size)
    # JSON is YAML, and keeps paths whole that hold signs of YAML.
    changes = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in _quick(args, config, world_size).items()
    ]
    return resolve(args.run_file, [*args.overrides, *changes], world_size) if changes else config


def remove_earlier_look(config: RunConfig) -> None:
    """A quick look starts afresh; only a folder that says it is this very look is removed."""
    folder = Path(config.run_dir)
    try:
        found = load_run_file(folder / "run.yaml")
    except ConfigError:  # nothing there, or nothing of ours
        return
    # A run that a person gave this name has no such output_dir, or has a tracker.
    marks = [(run.name, run.output_dir, run.tracking.uri) for run in (found, config)]
    if marks[0] == marks[1] and not folder.is_symlink():
        with exclusive(folder):  # not while that look still runs
            shutil.rmtree(folder)


def _plot(run_dir: Path) -> None:
    """Draw what there is. Nothing that fails here may hide how the run itself ended."""
    from mmtrain.report.plot import plot_run

    try:
        print(f"plot: {plot_run(run_dir)}")
    except MmtrainError:
        return  # not one step was taken
    except Exception as error:
        log.warning("plot.png was not drawn (%s: %s)", type(error).__name__, error)


def _quick(args: argparse.Namespace, config: RunConfig, world_size: int) -> dict[str, object]:
    """Changes of a quick look: its own folder, no tracker; nothing where none is asked for."""
    name, data, optim = config.name, config.data, config.optim
    if args.max_steps is not None:
        changes = {
            "name": f"{name}-quick",
            "output_dir": f"{config.run_dir}-quick",
            "tracking.uri": DISABLED,
            "optim.epochs": None,
            "optim.max_steps": args.max_steps,
        }
        if data and any(part.val for part in data.parts.values()):
            limit = data.val_limit or _QUICK_VALIDATION_SAMPLES
            changes["data.val_limit"] = min(limit, _QUICK_VALIDATION_SAMPLES)
        return changes
    if args.overfit is None:
        return {}
    batch = min(args.overfit, optim.micro_batch)
    return {
        "name": f"{name}-overfit",
        "output_dir": f"{config.run_dir}-overfit",
        "tracking.uri": DISABLED,
        "data.limit": args.overfit,
        **_own_validation(data),
        "data.val_limit": args.overfit,
        "optim.epochs": None,
        "optim.max_steps": 150,
        "optim.schedule": "constant",
        "optim.warmup_ratio": None,
        "optim.warmup_steps": None,
        "optim.micro_batch": batch,
        "optim.global_batch": batch * world_size,
        "validate.every": 50,
    }


def _own_validation(data: DataConfig | None) -> dict[str, object]:
    """What trains is what validates."""
    if data is None:
        return {}
    if data.mix:
        mix = [part.model_copy(update={"val": part.train}) for part in data.mix]
        return {"data.mix": [part.model_dump() for part in mix]}
    return {"data.val": data.train}
