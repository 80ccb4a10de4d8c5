"""What was found on a card: a JSON record, and the same as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import card_name, peak_tflops
from benchmarks.results import machine


class Results:
    """The record of one card; sections that were measured earlier stay until measured again."""

    def __init__(self, folder: Path, device: str) -> None:
        card = card_name(device)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{card.lower().replace(' ', '-')}.json"
        self._record: dict[str, Any] = {"card": card, "sections": {}}
        if self.path.exists():
            self._record = json.loads(self.path.read_text())
        self._machine = machine("cpu") | {"gpu": card}

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep one section's record; both files are written again."""
        dated = {"date": time.strftime("%Y-%m-%d"), "machine": self._machine, **record}
        self._record["sections"][name] = dated
        self.path.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        lines = markdown(self._record)
        self.path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def all_done(self, names: Iterable[str]) -> bool:
        """Whether each of these sections ended well."""
        return all(self._record["sections"][name]["end"] == "done" for name in names)


def markdown(record: Mapping[str, Any]) -> list[str]:
    """The tables."""
    lines = [f"# {record['card']}", ""]
    writers = {
        "tests": _tests,
        "training": _runs,
        "families": _runs,
        "trl-tuned": _peers,
        "trl": _peers,
        "profile": _profile,
    }
    for name, section in record["sections"].items():
        if name not in writers:  # measured by an older version, under a name of its own
            continue
        packages = ", ".join(
            f"{package} {section['machine'][package]}"
            for package in ("torch", "transformers", "peft", "deepspeed", "trl")
        )
        lines += [f"## {name}", "", f"{section['date']}; {section['end']}; {packages}.", ""]
        lines += [*writers[name](record["card"], section), ""]
    return lines[:-1]


def _tests(card: str, section: Mapping[str, Any]) -> list[str]:
    if "tests" not in section:
        return ["No test ended."]
    lines = [
        f"{section['tests']} tests, failed: {', '.join(section['failed']) or 'none'};"
        f" skipped: {', '.join(section['skipped']) or 'none'}."
    ]
    lines += [f"- {name}: {_compact(value)}" for name, value in section["facts"].items()]
    return lines


def _compact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_compact(inner)}" for key, inner in value.items())
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def _runs(card: str, section: Mapping[str, Any]) -> list[str]:
    gemm, peak = section.get("gemm_tflops"), peak_tflops(card)
    lines = []
    if gemm:
        lines += [f"Matrix product of random bf16 numbers: {gemm:.0f} TFLOP/s.", ""]
    lines += [
        "| run | micro-batch | tokens per sample | samples/s | tokens/s | 4P TFLOP/s | MFU |"
        " of its GEMM rate | peak GiB | estimate GiB | first step s | save s | validation s |",
        "|---" * 13 + "|",
    ]
    for run in section.get("runs", ()):
        if "error" in run:
            lines.append(f"| {run['name']} | {run['error']} |" + " |" * 11)
            continue
        rate = run["tflops_4p"]
        cells = [
            run["name"],
            str(run["micro_batch"]),
            f"{run['tokens_per_sample']:.0f}",
            f"{run['samples_per_s']:.1f}",
            f"{run['tokens_per_s']:.0f}",
            f"{rate:.0f}",
            f"{rate / peak:.0%}" if peak else "–",
            f"{rate / gemm:.0%}" if gemm else "–",
            f"{run['peak_gib']:.1f}",
            f"{run['estimate_gib']:.1f}",
            f"{run['first_step_s']:.1f}",
            *(f"{run['seconds'].get(part, 0.0):.1f}" for part in ("save", "validation")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Tokens are unpadded, images' included. 4P counts the LLM's matrices alone, four"
        " operations per weight and token: no embeddings, head, tower or attention. Peak is what"
        " torch allocated, the estimate `mmtrain check`'s for the largest batch, neither with"
        " CUDA's own memory.",
    ]


def _peers(card: str, section: Mapping[str, Any]) -> list[str]:
    lines = [
        "| precision | batch | peer | samples/s, median (min–max) | mmtrain / peer"
        " | largest loss difference |",
        "|---" * 6 + "|",
    ]
    for result in section.get("peers", ()):
        for label, speed in result["samples_per_s"].items():
            ratio = result["ratio"].get(label)
            difference = result["max_relative_loss_difference"].get(label)
            cells = [
                result["dtype"],
                str(result["batch"]),
                label,
                f"{speed['median']:.2f} ({speed['min']:.2f}–{speed['max']:.2f})",
                f"{ratio['median']:.2f}" if ratio else "1",
                f"{difference:.1e}" if difference is not None else "–",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _profile(card: str, section: Mapping[str, Any]) -> list[str]:
    lines = []
    for run in section.get("runs", ()):
        if "error" in run or "profile" not in run:
            lines.append(f"{run['name']}: {run.get('error', 'no profile')}")
            continue
        profile = run["profile"]
        lines += [
            f"{run['name']}: {profile['wall_s'] * 1000:.0f} ms under the profiler,"
            f" {profile['kernels']} kernels, {profile['waits']} waits of the host;"
            f" attention: {', '.join(profile['attention_kernels']) or 'no fused kernel'}.",
            "",
            "| kind | share of the step |",
            "|---|---|",
            *(f"| {kind} | {share:.1%} |" for kind, share in profile["shares"].items()),
            "",
            "| kernel | ms | calls |",
            "|---|---|---|",
            *(
                f"| `{kernel['name']}` | {kernel['seconds'] * 1000:.1f} | {kernel['count']} |"
                for kernel in profile["largest"]
            ),
        ]
    return lines
