"""mmtrain lmms: where the task files for lmms-eval are."""

from __future__ import annotations

import argparse

HELP = "print the folder of task files for lmms-eval's --include_path"
_EXAMPLES = """examples:
  lmms-eval --model mmtrain --model_args run=runs/r64 --batch_size 8 \\
      --include_path "$(mmtrain lmms)" --tasks mmtrain_scienceqa_kim2023
  mmtrain lmms --list"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--list", action="store_true", help="the names of the tasks instead")


def run(args: argparse.Namespace) -> int:
    """Print it, or the names."""
    from mmtrain.lmms import TASK_FILES

    if args.list:
        print("\n".join(sorted(path.stem for path in TASK_FILES.glob("*.yaml"))))
    else:
        print(TASK_FILES)
    return 0
