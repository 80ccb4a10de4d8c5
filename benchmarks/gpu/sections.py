"""What is measured on a card, in order of value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.card import memory_gib

LARGE_CARD_GIB = 120
RANK, DROPOUT = 128, 0.05
STEPS = {"cuda": 9, "cpu": 5}
# preset -> samples per forward that fit a card of 80 GB
FAMILIES = {
    "instructblip-flan-t5-xl": ("instructblip", 16),
    "instructblip-vicuna-7b": ("instructblip", 16),
    "qwen-vl-chat": ("qwen_vl", 8),
    "qwen2.5-vl-7b": ("qwen2_vl", 8),
    "llava-1.5-13b": ("llava", 4),
}
TINY = {"instructblip": "tiny-vicuna", "qwen_vl": "tiny", "qwen2_vl": "tiny-2.5", "llava": "tiny"}


@dataclass(frozen=True)
class Section:
    """A part of the measurement. `command` prepares its folder, `collect` reads what it left."""

    name: str
    title: str
    limit_s: float
    command: Callable[[str, Path], list[str]]
    collect: Callable[[Path], dict[str, Any]]


def _tests(device: str, scratch: Path) -> list[str]:
    files = [f"--junitxml={scratch / 'tests.xml'}", f"--basetemp={scratch / 'pytest'}"]
    return ["pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]


def _collect_tests(scratch: Path) -> dict[str, Any]:
    facts = {}
    for path in sorted((scratch / "pytest").glob("**/facts/*.json")):
        facts[path.stem] = json.loads(path.read_text())
    report = scratch / "tests.xml"
    if not report.exists():
        return {"facts": facts}
    cases = list(ElementTree.parse(report).iter("testcase"))

    def having(*ends: str) -> list[str]:
        found = (c for c in cases if any(c.find(end) is not None for end in ends))
        return [str(case.get("name")) for case in found]

    failed, skipped = having("failure", "error"), having("skipped")
    return {"tests": len(cases), "failed": failed, "skipped": skipped, "facts": facts}


def run_file(
    scratch: Path, family: str, preset: str, device: str, name: str, **changes: Any
) -> dict[str, Any]:
    """A run of LoRA on all linears of the LLM, the connector in full where a family has one."""
    on_card = device == "cuda"
    lora = {
        "mode": "peft",
        "method": "lora",
        "sublayers": ["attn", "mlp"] if family != "instructblip" else None,
        "r": changes.get("rank", RANK) if on_card else 4,
        "alpha": 2 * changes.get("rank", RANK) if on_card else 8,
        "dropout": changes.get("dropout", DROPOUT),
    }
    components: dict[str, Any] = {"llm": {k: v for k, v in lora.items() if v is not None}}
    components["projection" if family == "instructblip" else "connector"] = {"mode": "full"}
    batch = changes.get("micro_batch", 8) if on_card else 2
    shards = str(scratch / "shards")
    validates = changes.get("validates", False)
    return {
        "name": name,
        "output_dir": str(scratch / "runs" / name),
        "deterministic": changes.get("deterministic", True),
        "model": {
            "family": family,
            "checkpoint": str(scratch / "models" / preset),
            "dtype": "bf16" if on_card else "fp32",
        },
        "components": components,
        "data": {
            "task": "scienceqa",
            "train": shards,
            **({"val": shards, "val_limit": 4 * batch} if validates else {}),
            "workers": 4 if on_card else 0,
        },
        "optim": {
            "max_steps": STEPS[device],
            "global_batch": batch,
            "micro_batch": batch,
            "schedule": "constant",
        },
        "validate": {"every": 10**6},
        "generation": {"max_new_tokens": 8, "batch_size": batch},
        "parallel": {"deepspeed": "zero1"},
        "tracking": {"uri": "none"},
    }


def _training_program(
    scratch: Path, models: Mapping[str, str], jobs: list[dict[str, Any]]
) -> list[str]:
    """Write folders, shards and jobs; the program that trains them."""
    from benchmarks import shapes

    texts = shapes.write_shards(scratch / "shards", num_samples=200)
    for preset, family in models.items():
        shapes.write_folder(scratch / "models" / preset, family, preset, texts)
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    return ["benchmarks.gpu.train", str(scratch / "jobs.json"), str(scratch / "runs.jsonl")]


def _collect_runs(scratch: Path) -> dict[str, Any]:
    path = scratch / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A program that was stopped leaves half a line behind the runs that it measured.
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    runs = [record for record in records if "name" in record]
    gemm = [record["gemm_tflops"] for record in records if "gemm_tflops" in record]
    return {"runs": runs, **({"gemm_tflops": gemm[0]} if gemm else {})}


def _training(device: str, scratch: Path) -> list[str]:
    preset = "llava-1.5-7b" if device == "cuda" else "tiny"
    variants = {
        "r=128, dropout 0.05": {},
        "r=128, dropout 0": {"dropout": 0.0},
        "r=128, dropout 0.05, not deterministic": {"deterministic": False},
        # A checkpoint of rank 128 alone is 3.8 GB: too much to write for a measurement.
        "r=32, dropout 0.05, validated and saved": {"rank": 32, "validates": True},
    }
    jobs = [
        {
            "name": name,
            "run": run_file(scratch, "llava", preset, device, f"run-{i}", **changes),
            "ends": changes.get("validates", False),
        }
        for i, (name, changes) in enumerate(variants.items())
    ]
    return _training_program(scratch, {preset: "llava"}, jobs)


def _families(device: str, scratch: Path) -> list[str]:
    models, jobs = {}, []
    for published, (family, micro_batch) in FAMILIES.items():
        preset = published if device == "cuda" else TINY[family]
        if preset in models:
            continue
        models[preset] = family
        run = run_file(scratch, family, preset, device, preset, micro_batch=micro_batch)
        jobs.append({"name": preset, "run": run})
    return _training_program(scratch, models, jobs)


def _profile(device: str, scratch: Path) -> list[str]:
    preset = "llava-1.5-7b" if device == "cuda" else "tiny"
    run = run_file(scratch, "llava", preset, device, "profile")
    job = {"name": preset, "run": run, "profile_step": STEPS[device] - 1}
    return _training_program(scratch, {preset: "llava"}, [job])


def _beside(peer: str) -> Callable[[str, Path], list[str]]:
    def command(device: str, scratch: Path) -> list[str]:
        out = ["--out", str(scratch / "peers.json"), "--device", device, "--questions"]
        out += ["--peers", peer]
        if device == "cpu":
            tiny = ["--dtype", "fp32", "--batch", "2", "--windows", "1", "--steps", "2"]
            return ["benchmarks.single_run", *tiny, *out]
        batch = 4 if memory_gib() > LARGE_CARD_GIB else 2  # both hold a model at once
        shape = ["--preset", "llava-1.5-7b", "--dtype", "bf16", "--r", str(RANK)]
        windows = ["--windows", "4", "--steps", "4", "--batch", str(batch)]
        return ["benchmarks.single_run", *shape, *windows, *out]

    return command


def _peers(scratch: Path) -> dict[str, Any]:
    path = scratch / "peers.json"
    return {"peers": json.loads(path.read_text())["results"]} if path.exists() else {}


SECTIONS: Mapping[str, Section] = {
    section.name: section
    for section in (
        Section("tests", "correctness on this card", 200, _tests, _collect_tests),
        Section("training", "LLaVA-1.5-7B, LoRA r=128", 110, _training, _collect_runs),
        Section("trl-tuned", "beside TRL without recomputation", 80, _beside("trl-tuned"), _peers),
        Section("profile", "one step by kind of work", 60, _profile, _collect_runs),
        Section("families", "one line per family", 150, _families, _collect_runs),
        Section("trl", "beside TRL with its defaults", 80, _beside("trl"), _peers),
    )
}
