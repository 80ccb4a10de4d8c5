"""mmtrain export: a run as a standard Hugging Face folder, adapters folded in."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a trained run as a merged Hugging Face folder"
_EXAMPLES = """examples:
  mmtrain export runs/r64 --out merged/r64
The adapter alone is in the run folder already: runs/r64/adapter"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", required=True, help="folder to write")


def run(args: argparse.Namespace) -> int:
    """Merge and write."""
    from mmtrain import distributed
    from mmtrain.errors import MmtrainError
    from mmtrain.training.export import merged_state
    from mmtrain.training.inference import ready_from_argument

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise MmtrainError(f"--out {out} is not empty.", "Choose another folder, or empty it.")
    ready = ready_from_argument(args.run, ["parallel.deepspeed=zero1"], base=False)
    assembled = ready.assembled
    state = merged_state(assembled.model, assembled.trainable)
    assembled.family.code.save(assembled.model, assembled.processor, state, out)
    print(f"wrote {out}")
    distributed.shut_down()
    return 0
