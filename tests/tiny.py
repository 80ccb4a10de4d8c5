"""A tiny LLaVA of the real classes and small digit shards, made once per test session."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# With these a CPU that has more plays one that has AVX2 and nothing above: bf16 is emulated there.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
DIGITS_TEXTS = [
    "Which digit is in the picture? Options: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9. Answer:",
    "USER: ASSISTANT: 0 1 2 3 4 5 6 7 8 9 A. B. C. D.",
]


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A tiny LLaVA checkpoint folder with a locally trained tokenizer."""
    from mmtrain import plugins

    plugins.load("family", "llava").code.write_tiny(folder, DIGITS_TEXTS, seed)
    return folder


def build_digits(folder: Path, *options: str) -> Path:
    """Digit shards for every split, through the real command."""
    run_cli("shards", "build", "digits", "--out", str(folder), *options)
    return folder


def run_cli(
    *arguments: str, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`mmtrain …` as a user runs it."""
    result = subprocess.run(
        [sys.executable, "-m", "mmtrain", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        timeout=600,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"mmtrain {' '.join(arguments)}\n{result.stdout}\n{result.stderr}")
    return result


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_data(base_folder: Path, digits: Path, output_dir: Path, **sections: Any) -> dict[str, Any]:
    """A small run: LoRA with dropout on the LLM, the connector in full, 8 samples per step."""
    base: dict[str, Any] = {
        "name": output_dir.name,
        "output_dir": str(output_dir),
        "seed": 7,
        "model": {"family": "llava", "checkpoint": str(base_folder), "dtype": "fp32"},
        "components": {
            "connector": {"mode": "full", "lr": 1e-3},
            "llm": {
                "mode": "peft",
                "method": "lora",
                "sublayers": ["attn", "mlp"],
                "r": 4,
                "alpha": 8,
                "dropout": 0.1,
            },
        },
        "data": {"task": "digits", "train": str(digits / "train"), "workers": 1, "limit": 44},
        "optim": {"lr": 5e-3, "global_batch": 8, "micro_batch": 4, "max_steps": 6},
        "parallel": {"deepspeed": "zero1", "threads": 1},
        "tracking": {"uri": "none"},
    }
    for name, values in sections.items():
        if isinstance(values, dict) and isinstance(base.get(name), dict):
            base[name] = {**base[name], **values}
        else:
            base[name] = values
    return base


def write_run(folder: Path, data: Mapping[str, Any]) -> Path:
    """The run as a YAML file."""
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False))
    return path


def start_ranks(
    command: Sequence[str], world_size: int, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """One process per rank of `command` (module and arguments), as a launcher would start them."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            **(env or {}),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def wait_ranks(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 900) -> None:
    """All ranks must end well; the output of one that did not is the failure's message."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), f"ranks ended with {codes}\n" + "\n".join(outputs)[-6000:]


def read_metrics(run_dir: Path, name: str) -> list[float]:
    """One metric over the steps, from the journal."""
    values = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if name in entry["metrics"]:
            values.append(entry["metrics"][name])
    return values


def write_scienceqa_raw(folder: Path, num_samples: int = 24) -> Path:
    """Raw files in ScienceQA's layout; every third problem has no image."""
    from PIL import Image

    problems, ids = {}, []
    for number in range(num_samples):
        identifier = str(number + 1)
        has_image = number % 3 != 2
        if has_image:
            path = folder / "images" / "train" / identifier / "image.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + number, 24), (number * 9 % 256, 80, 160)).save(path)
        problems[identifier] = {
            "question": f"Which colour is number {number}?",
            "choices": ["red", "green", "blue"][: 2 + number % 2],
            "answer": number % 2,
            "hint": "Look closely." if number % 2 else "",
            "image": "image.png" if has_image else None,
            "lecture": "Colours are light.",
            "solution": "",
            "subject": "natural science",
            "topic": "physics",
            "skill": "Identify colours",
            "grade": "grade3",
            "split": "train",
        }
        ids.append(identifier)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ids, "val": [], "test": []}))
    return folder
