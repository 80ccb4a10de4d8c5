"""What cutting a step by length saves: the same samples in order, of like lengths, by tokens.

    python -m benchmarks.cut [--dtype fp32|bf16] [--windows 3] [--steps 1]

Samples are as long as ScienceQA's, every second with an image, LoRA's dropout on. Prints samples/s
of each cut in turn, the share of padding, and by how much losses differ; writes
benchmarks/results/cut-small-cpu.md. Takes about 4 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import material
from benchmarks.gate import Peer
from benchmarks.results import RESULTS, Measured, machine, shown
from benchmarks.single_run import WITH_DROPOUT
from benchmarks.single_run import arguments as single_run_arguments

GLOBAL_BATCH, MICRO_BATCH = 64, 8
# As many as the longest eight samples of a step in order take, within a few percent.
MICRO_TOKENS = 3200
CUTS: Mapping[str, Mapping[str, Any]] = {
    "mmtrain": {"cut": "order", "micro_batch": MICRO_BATCH},
    "balanced": {"cut": "balanced", "micro_batch": MICRO_BATCH},
    "balanced, micro_tokens": {"cut": "balanced", "micro_tokens": MICRO_TOKENS},
}


def measure(args: argparse.Namespace, folder: Path) -> tuple[Measured, dict[str, float]]:
    """Windows of every cut in turn; the share of padding of each."""
    job = material.prepare(args, folder)
    outputs = {label: folder / f"cut-{number}" for number, label in enumerate(CUTS)}
    result = Measured(
        args.dtype, "as long as ScienceQA's", args.dropout, args.batch, args.steps, list(CUTS)
    )
    with ExitStack() as stack:
        peers = {}
        for label, options in CUTS.items():
            output = outputs[label]
            own = {"output_dir": str(output), "digests": f"{output}.digests"}
            peers[label] = Peer(
                output.name, "benchmarks.peer_mmtrain", {**job, **own, "options": options}, folder
            )
            stack.callback(peers[label].close)
        for peer in peers.values():
            peer.facts()
        for window in range(material.WARM_UP_WINDOWS + args.windows):
            for label, peer in peers.items():
                timed = window >= material.WARM_UP_WINDOWS
                result.add(label, *peer.window(args.steps), timed=timed)
                print(result.window_line(window, label), flush=True)
    padding = {}
    for label, output in outputs.items():
        tokens, padded = json.loads((output / "padding.json").read_text())
        padding[label] = 1 - tokens / padded
    return result, padding


def table(result: Measured, padding: Mapping[str, float]) -> list[str]:
    """One row per cut; the speed of each over the first's, window beside window."""
    where = machine("cpu")
    lines = [
        "# A step cut in order and by length",
        "",
        f"{where['cpu']}, {where['cores']} cores; {result.title}; {GLOBAL_BATCH} samples a step,"
        f" {MICRO_BATCH} or {MICRO_TOKENS} padded tokens a forward;"
        f" {len(result.seconds['mmtrain'])} windows in turn.",
        "",
        "| cut | padding | samples/s | speed | largest loss difference | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for label in result.labels:
        speeds = [1 / ratio for ratio in result.ratios(label)]
        name = "order" if label == "mmtrain" else label
        cells = [name, f"{padding[label]:.1%}", shown(result.samples_per_s(label)), shown(speeds)]
        cells += [f"{result.loss_difference(label):.1e}", f"{result.peak_gib[label]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cut", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--windows", type=int, default=3, help="timed windows per cut")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps per window")
    parser.add_argument("--out", type=Path, default=RESULTS / "cut-small-cpu.md")
    own = parser.parse_args()
    args = single_run_arguments([])
    args.__dict__.update(WITH_DROPOUT | vars(own) | {"batch": GLOBAL_BATCH})
    with tempfile.TemporaryDirectory(prefix="mmtrain-benchmark-") as scratch:
        lines = table(*measure(args, Path(scratch)))
    own.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
