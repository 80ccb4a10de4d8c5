"""Prove and measure everything on one card, within a budget, and keep results as they come.

    python -m benchmarks.gpu [--budget 480] [--only tests training …] [--out FOLDER]
    python -m benchmarks.gpu --device cpu --out FOLDER     the same sections on tiny models

Sections run in order of value, each in a process of its own with a limit of its own; one that
fails or runs out of time is reported, and the rest goes on. After each, gpu-<card>.json and .md
are written again. It installs nothing and needs no network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Results
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.results import RESULTS

LEAST_USEFUL_S = 20  # a section that has less left is not begun


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--budget", type=int, default=480, help="seconds for all sections")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


def run_section(section: Section, device: str, scratch: Path, limit_s: float) -> dict[str, Any]:
    """Its record, whatever fails: what it measured, how it ended, how long it took."""
    began_s = time.monotonic()
    log = scratch / f"{section.name}.log"
    end, found = "", {}
    try:
        end = _ended(section.command(device, scratch), device, log, limit_s)
        found = section.collect(scratch)  # of files that the limit may have cut
    except Exception as error:
        fault = f"failed: {type(error).__name__}: {error}"
        end = fault if end in ("", "done") else f"{end}; {fault}"
        with log.open("a") as output:
            traceback.print_exc(file=output)
    record = {"end": end, "seconds": time.monotonic() - began_s, **found}
    if end != "done":
        record["log"] = log.read_text(errors="replace")[-3000:]
    return record


def _ended(program: Sequence[str], device: str, log: Path, limit_s: float) -> str:
    """Run a section's program; how it ended."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MMTRAIN_CARD": device}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", *program]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            code = process.wait(timeout=limit_s)
            return "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after its limit of {limit_s:.0f} s"
        finally:
            # What it started must not hold the card while the next section measures.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Every section; 0 when all of them ended well."""
    args = arguments(argv)
    results = Results(args.out, args.device)
    deadline_s = time.monotonic() + args.budget
    for name in args.only or SECTIONS:
        section = SECTIONS[name]
        left_s = deadline_s - time.monotonic()
        if left_s < LEAST_USEFUL_S:
            results.add(name, {"end": "not begun: the budget was spent", "seconds": 0.0})
            continue
        print(f"{name}: {section.title} …", flush=True)
        with tempfile.TemporaryDirectory(prefix="mmtrain-gpu-") as scratch:
            # The limits are a card's; a CPU may take what there is.
            limit_s = min(left_s, section.limit_s) if args.device == "cuda" else left_s
            record = run_section(section, args.device, Path(scratch), limit_s)
        results.add(name, record)
        print(f"{name}: {record['end']}, {record['seconds']:.0f} s", flush=True)
        if "log" in record:
            print(record["log"], flush=True)
    print(f"written: {results.path}")
    return 0 if results.all_done(args.only or SECTIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
