"""The loop over optimizer steps: train, log, validate, save, stop."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmtrain.data.source import Source
from mmtrain.data.stream import StepBatches, StepStream
from mmtrain.evaluation.evaluate import recorded_metrics
from mmtrain.tasks.choice import tasks_of
from mmtrain.training.engine import Engine
from mmtrain.training.inference import evaluate_with_progress
from mmtrain.training.progress import Progress
from mmtrain.training.step import train_step
from mmtrain.training.trainee import Trainee

log = logging.getLogger("mmtrain")
OnValidation = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Loop:
    """Drives trainees, which go in step, through an engine."""

    engine: Engine
    stream: StepStream
    validation: Mapping[str, Source]  # by the name of its data set
    on_validation: OnValidation | None = None

    def run(self, trainees: Sequence[Trainee]) -> None:
        """Train from the step that was reached to the end, or until patience runs out."""
        going = [trainee for trainee in trainees if not trainee.done]
        if not going:
            return
        (start,) = {trainee.state.step for trainee in going}
        stop = max(trainee.total_steps for trainee in going)
        self.engine.train_mode()
        with Progress("train", stop, self.engine.world.is_main, start) as progress:
            began_s = time.perf_counter()
            for batches in self.stream.steps(start, stop):
                losses = [self._step(trainee, batches, began_s) for trainee in going]
                shown = ", ".join(f"{loss:.4f}" for loss in losses)
                progress.update(batches.position + 1, f"loss {shown}")
                for trainee in going:
                    self._validate_and_save(trainee)
                going = [trainee for trainee in going if not trainee.done]
                if not going:
                    break
                began_s = time.perf_counter()

    def _step(self, trainee: Trainee, batches: StepBatches, began_s: float) -> float:
        rate = trainee.begin_step(self.engine)
        result = train_step(self.engine, batches, trainee)
        trainee.state.step = batches.position + 1
        trainee.take_bad_samples(result.num_bad)
        elapsed_s = time.perf_counter() - began_s
        metrics = {
            "train/loss": result.loss,
            "train/lr": rate,
            "train/grad_norm": result.gradient_norm,
            "train/samples_per_s": batches.num_samples / elapsed_s,
            "train/tokens_per_s": result.num_tokens / elapsed_s,
            "memory/peak_gib": peak_memory_gib(),
            **{f"train/{name}": value for name, value in result.auxiliary.items()},
        }
        if trainee.state.bad_samples:
            metrics["train/bad_samples"] = trainee.state.bad_samples
        trainee.record(metrics)
        return result.loss

    def _validate_and_save(self, trainee: Trainee) -> None:
        """When it is time: a validation is always followed by a checkpoint."""
        if self.validation and trainee.validates_now():
            self._validate(trainee)
            trainee.save(self.engine)
        elif trainee.saves_now():
            trainee.save(self.engine)

    def _validate(self, trainee: Trainee) -> None:
        step, tasks = trainee.state.step, tasks_of(trainee.config)
        settings = trainee.config.generation
        self.engine.evaluation_mode()
        evaluations = {
            name: evaluate_with_progress(
                f"validate {name}".strip(), self.engine, source, tasks[name], settings
            )
            for name, source in self.validation.items()
        }
        self.engine.train_mode()
        if self.engine.world.is_main:
            recorded = recorded_metrics(evaluations).items()
            shown = ", ".join(
                f"{name.removeprefix('val/')} {value:.4f}" for name, value in recorded
            )
            log.info("step %d: validation %s", step, shown)
        metrics = trainee.take_validation(evaluations)
        if self.on_validation is not None:
            self.on_validation(step, metrics)


def peak_memory_gib() -> float:
    """This rank's peak: device memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
