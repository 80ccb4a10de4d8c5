"""Our side: the ordinary training entry, its loop, journal and data path included.

Only the pace comes from the benchmark, between optimizer steps, as on TRL's side.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gate import Gate, batch_digest, read_job
from benchmarks.shapes import random_weights
from mmtrain.resolve import resolve
from mmtrain.training import loop
from mmtrain.training.run import run_training
from mmtrain.training.step import StepResult, train_step


class Enough(Exception):
    """The benchmark wants no further step."""


def run_file(job: dict[str, Any]) -> dict[str, Any]:
    """The run file of this comparison."""
    lora = job["lora"]
    adapted = {"mode": "peft", "method": "lora", "sublayers": ["attn", "mlp"]}
    return {
        "name": "benchmark",
        "output_dir": job["output_dir"],
        "deterministic": False,  # TRL's default, too
        "seed": job["seed"],
        "model": {"family": "llava", "checkpoint": job["model"], "dtype": job["dtype"]},
        "components": {
            "connector": {"mode": "full"},
            "llm": adapted | {key: lora[key] for key in ("r", "alpha", "dropout")},
        },
        "data": {
            "task": job["task"],
            "train": job["shards"],
            "workers": job["workers"],
            "cut": job["options"].get("cut", "order"),
        },
        "optim": {
            "lr": job["lr"],
            "schedule": "constant",
            "max_steps": job["max_steps"],
            "global_batch": job["batch"],
            "micro_batch": job["options"].get("micro_batch", job["batch"]),
            "micro_tokens": job["options"].get("micro_tokens"),
        },
        "parallel": {"deepspeed": job["deepspeed"], "threads": job["threads"]},
        "tracking": {"uri": "none"},
    }


def save_lora(model: torch.nn.Module, file: Path) -> None:
    """Every A and B before the first step, without the adapter's name."""
    values = {
        name.replace(".llm.weight", ".weight"): parameter.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    save_file(values, str(file))


def main() -> None:
    """Train until the benchmark has seen enough windows."""
    job, read_fd, write_fd = read_job()
    gate = Gate(read_fd, write_fd, job["device"])
    digests: list[str] = []
    told, padded = 0, 0  # tokens of samples, and with what pads them

    def paced_step(engine: Any, step: Any, *rest: Any) -> StepResult:
        if not digests:
            save_lora(engine.model, Path(job["lora_init"]))
            tokens = step.micro_batches[0].num_tokens / job["batch"]
            gate.ready({"tokens_per_sample": tokens})
            if not gate.open():
                raise Enough
        if len(digests) < 2:
            digests.append(batch_digest(step.micro_batches[0].tensors))
            Path(job["digests"]).write_text(json.dumps(digests))
        nonlocal told, padded
        told += sum(batch.num_tokens for batch in step.micro_batches)
        padded += sum(batch.tensors["input_ids"].numel() for batch in step.micro_batches)
        Path(job["output_dir"], "padding.json").write_text(json.dumps([told, padded]))
        result = train_step(engine, step, *rest)
        if not gate.step_done(result.loss):
            raise Enough
        return result

    setattr(loop, "train_step", paced_step)
    weights = random_weights() if job["draws_weights"] else nullcontext()
    try:
        with weights:
            run_training(resolve(run_file(job)))
    except Enough:
        pass


if __name__ == "__main__":
    main()
