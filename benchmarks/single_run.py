"""mmtrain and TRL's SFTTrainer on the same LLaVA, batches and LoRA, window by window in turn.

    python -m benchmarks.single_run [--dtype fp32|bf16|both] [--windows 3] [--steps 3]
    python -m benchmarks.single_run --preset llava-1.5-7b --device cuda --dtype bf16

Prints samples/s of each, the ratios, peaks of memory, and the losses side by side; writes
benchmarks/results/. The last measurement has samples as long as ScienceQA's and LoRA's dropout.
Takes about 4 minutes for both precisions on 2 CPU cores; a CPU that emulates bf16 measures fp32.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bf16 import emulation
from benchmarks.gate import Peer
from benchmarks.results import Measured, machine, summary_lines, write_results

# TRL as it comes, and TRL told to keep its activations: the fastest it can do here.
TRL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "trl": {},
    "trl-tuned": {"gradient_checkpointing": False},
}
# Added to the plain measurements: what ScienceQA is trained with. Fewer steps, for they are longer.
WITH_DROPOUT = {
    "questions": True,
    "image_every": 2,
    "dropout": 0.05,
    "peers": ["trl-tuned"],
    "batch": 8,
    "windows": 3,
    "steps": 2,
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.single_run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", help="a published LLaVA shape instead of the 30 M one")
    parser.add_argument(
        "--questions", action="store_true", help="samples as long as ScienceQA's, not digits"
    )
    parser.add_argument("--image-every", type=int, default=1, help="questions from image to image")
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA's")
    parser.add_argument("--peers", nargs="+", choices=list(TRL_OPTIONS), default=list(TRL_OPTIONS))
    parser.add_argument("--windows", type=int, default=3, help="timed windows per peer")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps per window")
    parser.add_argument("--batch", type=int, default=16, help="samples per optimizer step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads per peer")
    parser.add_argument("--deepspeed", default="zero1", help="mmtrain's parallel.deepspeed")
    parser.add_argument("--r", type=int, default=8, help="LoRA rank on all LLM linears")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default: by name in the results folder"
    )
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, folder: Path) -> Measured:
    """Start every peer, warm each up, then alternate timed windows."""
    from benchmarks import material

    folder.mkdir(parents=True, exist_ok=True)
    job = material.prepare(args, folder)
    peers: dict[str, Peer] = {}
    with ExitStack() as stack:

        def start(label: str, module: str, options: Mapping[str, Any]) -> None:
            own = {"output_dir": str(folder / label), "digests": str(folder / f"{label}.digests")}
            peers[label] = Peer(label, module, {**job, **own, "options": dict(options)}, folder)
            stack.callback(peers[label].close)

        start("mmtrain", "benchmarks.peer_mmtrain", {})
        chosen = args.peers if find_spec("trl") else []
        if not chosen:
            print("trl is not installed: its columns are left out", flush=True)
        for label in chosen:
            options = TRL_OPTIONS[label]
            workers = {"dataloader_num_workers": job["workers"]} if options else {}
            start(label, "benchmarks.peer_trl", {**options, **workers})
        samples = "as long as ScienceQA's" if args.questions else "digits"
        result = Measured(args.dtype, samples, args.dropout, args.batch, args.steps, list(peers))
        print(f"{result.title}: starting {', '.join(peers)}", flush=True)
        result.facts = {label: peer.facts() for label, peer in peers.items()}["mmtrain"]
        for window in range(material.WARM_UP_WINDOWS + args.windows):
            for label, peer in peers.items():
                timed = window >= material.WARM_UP_WINDOWS
                result.add(label, *peer.window(args.steps), timed=timed)
                print(result.window_line(window, label), flush=True)
    result.check_batches({label: folder / f"{label}.digests" for label in peers})
    return result


def precisions(asked: str, device: str) -> tuple[str, ...]:
    """What to measure: bf16 only by request where the CPU emulates it, many times slower."""
    if asked != "both":
        return (asked,)
    if device == "cpu" and (emulated := emulation()):
        print(f"bf16 is left out: {emulated}; --dtype bf16 measures it all the same", flush=True)
        return ("fp32",)
    return ("fp32", "bf16")


def measurements(args: argparse.Namespace) -> list[argparse.Namespace]:
    """One for each precision; on the small model one more, in the last, with dropout."""
    found = [
        argparse.Namespace(**vars(args) | {"dtype": dtype})
        for dtype in precisions(args.dtype, args.device)
    ]
    if args.preset or args.questions or args.dropout:
        return found
    return [*found, argparse.Namespace(**vars(found[-1]) | WITH_DROPOUT)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = arguments(argv)
    results = []
    with tempfile.TemporaryDirectory(prefix="mmtrain-benchmark-") as scratch:
        for number, one in enumerate(measurements(args)):
            results.append(measure(one, Path(scratch) / str(number)))
    for result in results:
        print("\n".join(["", *summary_lines(result)]))
    print(f"\nwritten: {write_results(args, results, machine(args.device))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
