"""A list of ordinary training runs on published shapes, each measured from inside.

`python -m benchmarks.gpu.train JOBS.json OUT.jsonl`: a line per run, written as soon as it ends.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.kernels import profiled, summarise
from benchmarks.shapes import random_weights
from mmtrain import distributed, plugins
from mmtrain.models.interface import Batch, BatchSize
from mmtrain.planning.memory import GIB, estimate
from mmtrain.resolve import model_options, resolve
from mmtrain.training import loop
from mmtrain.training.run import run_training
from mmtrain.training.step import StepResult, train_step
from mmtrain.training.trainee import Trainee

WARM_UP_STEPS = 3
GEMM_SIDE = {"cuda": 8192, "cpu": 512}


class Enough(Exception):
    """Every step was taken; what is large is not written for nothing."""


@dataclass
class Clock:
    """When each optimizer step of a run ended, and what it trained."""

    started_s: float
    last_step: int | None  # None: the run ends by itself, validated, saved and exported
    profile_step: int | None
    adapter_rank: int
    ended_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    longest: BatchSize = BatchSize(0, 0, 0)
    losses: list[float] = field(default_factory=list)
    seconds_of: dict[str, float] = field(default_factory=dict)
    profile: dict[str, Any] | None = None

    def step(self, engine: Any, batches: Any, *rest: Any) -> StepResult:
        """train_step, timed to the end of its last kernel."""
        if len(self.ended_s) == self.profile_step:
            step = profiled(lambda: train_step(engine, batches, *rest))
            result, self.profile = step.result, summarise(step, self.adapter_rank)
        else:
            result = train_step(engine, batches, *rest)
        synchronize()
        self.longest = max(self.longest, *map(size_of, batches.micro_batches), key=_padded_tokens)
        self.ended_s.append(time.perf_counter())
        self.tokens.append(result.num_tokens)
        self.losses.append(result.loss)
        if len(self.ended_s) == self.last_step:
            raise Enough
        return result

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add up what is spent inside."""
        synchronize()
        began_s = time.perf_counter()
        yield
        synchronize()
        spent_s = time.perf_counter() - began_s
        self.seconds_of[name] = self.seconds_of.get(name, 0.0) + spent_s


def size_of(batch: Batch) -> BatchSize:
    """What a padded micro-batch measures."""
    samples = len(batch.ids)
    answers = -(-batch.num_answer_tokens // samples)
    return BatchSize(samples, batch.tensors["input_ids"].shape[-1], answers)


def _padded_tokens(size: BatchSize) -> int:
    return size.samples * size.tokens


def synchronize() -> None:
    """Wait for the card, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train a run file; its speed, memory and the seconds of its parts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    config = resolve(job["run"])
    clock = Clock(
        time.perf_counter(),
        None if job.get("ends") else config.optim.max_steps,
        job.get("profile_step"),
        job["run"]["components"]["llm"]["r"],
    )
    validate = loop.Loop._validate

    def timed_validate(self: Any, *rest: Any) -> None:
        with clock.timing("validation"):
            validate(self, *rest)

    save = Trainee.save

    def timed_save(self: Trainee, engine: Any) -> None:
        with clock.timing("save"):
            save(self, engine)

    with (
        random_weights(),
        patch.object(loop, "train_step", clock.step),
        patch.object(loop.Loop, "_validate", timed_validate),
        patch.object(Trainee, "save", timed_save),
    ):
        try:
            run_training(config)
        except Enough:
            pass
    speed = _speed(clock, config)
    return {
        "name": job["name"],
        **speed,
        "estimate_gib": estimate(config, 1, clock.longest)[1].allocated / GIB,
        "first_step_s": clock.ended_s[0] - clock.started_s,
        "seconds": clock.seconds_of,
        "peak_gib": loop.peak_memory_gib(),
        "losses": clock.losses,
        **({"profile": clock.profile} if clock.profile else {}),
    }


def _speed(clock: Clock, config: Any) -> dict[str, Any]:
    ends = clock.ended_s[WARM_UP_STEPS - 1 :]
    seconds = [after - before for before, after in zip(ends, ends[1:])]
    step_s = statistics.median(seconds)
    batch = config.optim.global_batch
    tokens_per_step = statistics.mean(clock.tokens[WARM_UP_STEPS:])
    return {
        "step_s": step_s,
        "step_s_spread": [min(seconds), max(seconds)],
        "micro_batch": config.optim.micro_batch,
        "samples_per_s": batch / step_s,
        "tokens_per_sample": tokens_per_step / batch,
        "tokens_per_s": tokens_per_step / step_s,
        "tflops_4p": 4e-12 * llm_matrix_params(config) * tokens_per_step / step_s,
    }


def llm_matrix_params(config: Any) -> int:
    """Weights of the LLM that every token is multiplied with: no embeddings, no head."""
    family = plugins.load("family", config.model.family)
    with torch.device("meta"):
        model = family.code.skeleton(family.code.model_config(model_options(config)))
    names = [
        pattern
        for roles in family.sublayers["llm"].values()
        for pattern in (roles[role] for role in roles)
    ]
    wanted = re.compile("|".join(f"(?:{name.replace('?P<layer>', '')})" for name in names))
    return sum(
        value.numel()
        for name, value in model.named_parameters()
        if wanted.fullmatch(name.removesuffix(".weight"))
    )


def gemm_tflops() -> float:
    """What the card's matrix product reaches on random bf16 numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = GEMM_SIDE[device]
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    began_s = time.perf_counter()
    for _ in range(10):
        left @ right
    synchronize()
    return 2e-12 * side**3 * 10 / (time.perf_counter() - began_s)


def main(jobs_file: Path, out: Path) -> int:
    """Every job in order; one that fails is a line, too. 0 when all of them ended well."""
    failed = 0
    with out.open("a", encoding="utf-8") as lines:

        def write(record: Mapping[str, Any]) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        write({"gemm_tflops": gemm_tflops()})
        for job in json.loads(jobs_file.read_text()):
            try:
                write(measure(job))
            except Exception as error:  # the other runs are still worth having
                failed += 1
                traceback.print_exc()
                write({"name": job["name"], "error": f"{type(error).__name__}: {error}"[:500]})
            gc.collect()
            torch.cuda.empty_cache()
    distributed.shut_down()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
