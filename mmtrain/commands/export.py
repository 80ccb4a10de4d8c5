"""mmtrain export: a run for other tools, proven by reading it back."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a trained run as a merged model, a PEFT adapter, or what vLLM serves"
_EXAMPLES = """examples:
  mmtrain export runs/r64 --out merged/r64
  mmtrain export runs/r64 --to peft --out adapters/r64
  mmtrain export runs/r64 --to vllm --out served/r64
What was written is read back, and kept only if it gives the run's logits."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--to",
        choices=("merged", "peft", "vllm"),
        default="merged",
        help="merged: a Hugging Face folder with adapters folded in (default); peft: adapter/ and"
        " full/ with a card that loads them; vllm: the same, where vLLM takes it",
    )


def run(args: argparse.Namespace) -> int:
    """Write, read back, compare."""
    from mmtrain import distributed
    from mmtrain.errors import MmtrainError
    from mmtrain.training.exporting import export_run
    from mmtrain.training.inference import ready_from_argument

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MmtrainError(f"--out {out} is not empty.", "Choose another folder, or empty it.")
    ready = ready_from_argument(args.run, ["parallel.deepspeed=zero1"], base=False)
    apart = export_run(ready, out, args.to)
    proof = "not compared: peft reads a prefix with the whole model's own forward"
    if apart is not None:
        reader = "transformers" if args.to == "merged" else "peft, or mmtrain where peft cannot"
        proof = f"read back by {reader}: its logits are within {apart:.1g} of the run's"
    print(f"wrote {out} ({proof})")
    distributed.shut_down()
    return 0
