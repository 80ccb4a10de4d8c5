"""Numbers of a benchmark: what they mean, how they are shown, where they are kept."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "mmtrain"
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate")


@dataclass
class Measured:
    """Windows of every peer on one kind of samples in one precision."""

    dtype: str
    samples: str
    dropout: float
    batch: int
    steps_per_window: int
    labels: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    identical_batches: bool = False

    @property
    def title(self) -> str:
        """What was trained."""
        dropped = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.dtype}, {self.samples}{dropped}"

    def add(
        self, label: str, seconds: float, losses: list[float], peak_gib: float, timed: bool
    ) -> None:
        """Take one window; losses count from the first step, seconds only when timed."""
        self.peak_gib[label] = peak_gib
        self.losses.setdefault(label, []).extend(losses)
        self.seconds.setdefault(label, [])
        if timed:
            self.seconds[label].append(seconds)

    def window_line(self, window: int, label: str) -> str:
        """One line of progress."""
        timed = self.seconds[label]
        speed = f"{self.samples_per_s(label)[-1]:8.2f} samples/s" if timed else "   warm-up"
        loss = self.losses[label][-1]
        return f"  window {window}  {label:<10} {speed}   loss {loss:.6f}"

    def samples_per_s(self, label: str) -> list[float]:
        """Speed of every timed window."""
        return [self.batch * self.steps_per_window / value for value in self.seconds[label]]

    def ratios(self, label: str) -> list[float]:
        """Our speed over a peer's, window beside window."""
        theirs = self.samples_per_s(label)
        return [ours / other for ours, other in zip(self.samples_per_s(OURS), theirs, strict=True)]

    def loss_difference(self, label: str, steps: int | None = None) -> float:
        """The largest relative difference between our losses and a peer's, of the first steps."""
        pairs = zip(self.losses[OURS][:steps], self.losses[label][:steps], strict=True)
        return max(abs(ours - other) / abs(other) for ours, other in pairs)

    def check_batches(self, digest_files: Mapping[str, Path]) -> None:
        """Every peer must have trained on the same tensors, or nothing here means anything."""
        digests = {label: file.read_text() for label, file in digest_files.items()}
        self.identical_batches = len(set(digests.values())) == 1
        if not self.identical_batches:
            raise RuntimeError(f"the peers saw different batches: {digests}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def shown(values: Sequence[float]) -> str:
    found = spread(values)
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def summary_lines(result: Measured) -> list[str]:
    """The table of one precision, and the losses side by side."""
    others = [label for label in result.labels if label != OURS]
    num_windows = len(result.seconds[OURS])
    lines = [f"{result.title}: median (min–max) of {num_windows} windows of"]
    lines[0] += f" {result.steps_per_window} steps × {result.batch} samples, batches identical"
    for label in result.labels:
        speed, peak = shown(result.samples_per_s(label)), result.peak_gib[label]
        lines.append(f"  {label:<10} {speed} samples/s, peak {peak:.2f} GiB")
    for label in others:
        lines.append(f"  {OURS} / {label}: {shown(result.ratios(label))}")
    lines.append("  losses   step " + "".join(f"{label:>14}" for label in result.labels))
    num_steps = len(result.losses[OURS])
    for step in sorted({0, 1, num_steps // 2, num_steps - 1}):
        row = "".join(f"{result.losses[label][step]:14.7f}" for label in result.labels)
        lines.append(f"           {step + 1:4d} {row}")
    for label in others:
        difference = result.loss_difference(label)
        lines.append(f"  largest relative loss difference to {label}: {difference:.1e}")
    return lines


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": _num_cores(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
    }
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def installed_version(package: str) -> str:
    """A package's version; a peer may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _num_cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write_results(
    args: argparse.Namespace, results: Sequence[Measured], where: Mapping[str, Any]
) -> Path:
    """The JSON record, and one row per measurement in the table beside it."""
    day = time.strftime("%Y-%m-%d")
    shape = args.preset or "small"
    path = args.out or RESULTS / f"single_run-{shape}-{args.device}.json"
    record = {
        "benchmark": "single_run",
        "date": day,
        "shape": shape,
        "device": args.device,
        "machine": dict(where),
        "lora_rank": args.r,
        "threads": args.threads,
        "results": [_record(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = path.with_suffix(".md")
    table.write_text("\n".join(_markdown(record, results)) + "\n", encoding="utf-8")
    return path


def _record(result: Measured) -> dict[str, Any]:
    others = [label for label in result.labels if label != OURS]
    return {
        **asdict(result),
        "samples_per_s": {label: spread(result.samples_per_s(label)) for label in result.labels},
        "ratio": {label: spread(result.ratios(label)) for label in others},
        "max_relative_loss_difference": {label: result.loss_difference(label) for label in others},
    }


def _markdown(record: Mapping[str, Any], results: Sequence[Measured]) -> list[str]:
    where = record["machine"]
    place = where.get("gpu") or f"{where['cpu']}, {where['cores']} cores"
    versions = ", ".join(f"{name} {where[name]}" for name in PACKAGES)
    lines = [
        f"# Single run beside TRL's SFTTrainer: {record['shape']} on {record['device']}",
        "",
        f"{record['date']}, {place}; {versions}.",
        "Samples/s, median (min–max) of alternating windows; the peak of each process's memory.",
        "`trl` is SFTTrainer with its defaults, `trl-tuned` the same without recomputation.",
        "mmtrain runs with `deterministic: false`, TRL's default too; on a CPU neither side",
        "prepares data ahead of the step. Masks of dropout differ: so do losses after the first.",
        "",
    ]
    labels = results[0].labels
    others = [label for label in labels if label != OURS]
    heads = ["", *labels, *(f"mmtrain / {label}" for label in others)]
    heads += ["loss difference, first step", "all steps", "peak GiB, in this order"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        theirs = [label for label in others if label in result.labels]
        found = {label: shown(result.samples_per_s(label)) for label in result.labels}
        cells = [result.title, *(found.get(label, "–") for label in labels)]
        cells += [shown(result.ratios(one)) if one in theirs else "–" for one in others]
        for steps in (1, None):
            differences = [result.loss_difference(label, steps) for label in theirs]
            cells.append(f"{max(differences):.1e}" if differences else "–")
        cells.append(", ".join(f"{result.peak_gib[label]:.2f}" for label in result.labels))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
