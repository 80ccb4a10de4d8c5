"""The loop over optimizer steps: train, log, validate, save, stop."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmtrain import distributed
from mmtrain.config.schema import RunConfig
from mmtrain.data.stream import StepStream
from mmtrain.evaluation.evaluate import Evaluation
from mmtrain.tasks.interface import LOSS, Metric
from mmtrain.training.audit import component_gradient_norms, refuse_dead_components
from mmtrain.training.early_stopping import EarlyStopping
from mmtrain.training.engine import Engine
from mmtrain.training.optim import learning_rate, total_steps
from mmtrain.training.progress import Progress
from mmtrain.training.step import StepResult, Trained, train_step

# Of what `_metrics` records, that which is better one way: a learning rate is not.
TRAINING_METRICS = (
    replace(LOSS, name="train/loss"),
    Metric("train/samples_per_s", larger_is_better=True, unit="samples/s"),
    Metric("train/tokens_per_s", larger_is_better=True, unit="tokens/s"),
    Metric("memory/peak_gib", larger_is_better=False, unit="GiB"),
)


@dataclass
class RunState:
    """What a checkpoint keeps of the loop: everything that is not a tensor."""

    step: int = 0  # optimizer steps done, which is also the stream's position
    best_metrics: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False


@dataclass
class Loop:
    """One run's moving parts. `record`, `save` and `validate` act; the loop only decides."""

    config: RunConfig
    engine: Engine
    stream: StepStream
    parameters: dict[str, torch.nn.Parameter]
    owner: dict[str, str]
    stopping: EarlyStopping
    state: RunState
    validate: Callable[[int], Evaluation] | None
    keep_best: Callable[[Evaluation], None]
    record: Callable[[int, float, dict[str, float]], None]
    save: Callable[[], None]
    on_validation: Callable[[int, dict[str, float]], None] | None

    def run(self) -> None:
        """Train from the state's step to the end, or until patience runs out."""
        per_epoch = self.stream.steps_per_epoch
        total = total_steps(self.config.optim, per_epoch)
        start = self.state.step
        if start >= total or self.state.stopped_early:
            return
        self.engine.train_mode()
        trained = Trained(self.parameters, self.owner)
        with Progress("train", total, self.engine.world.is_main, start) as progress:
            began_s = time.perf_counter()
            for batches in self.stream.steps(start, total):
                self._key(batches.position)
                rate = self._set_rates(batches.position, total, per_epoch)
                audit = self._audit if batches.position == 0 else None
                result = train_step(self.engine, batches, trained, audit)
                self.state.step = batches.position + 1
                ended_s = time.perf_counter()
                metrics = self._metrics(result, batches.num_samples, rate, ended_s - began_s)
                self.record(self.state.step, self.state.step / per_epoch, metrics)
                progress.update(self.state.step, f"loss {result.loss:.4f}")
                self._after_step(total, per_epoch)
                if self.state.stopped_early:
                    break
                began_s = time.perf_counter()

    def _key(self, position: int) -> None:
        self.engine.set_step(self.config.seed, position)

    def _set_rates(self, position: int, total: int, per_epoch: int) -> float:
        optim = self.config.optim
        return self.engine.set_learning_rates(
            lambda peak: learning_rate(peak, position, total, per_epoch, optim)
        )

    def _audit(self) -> None:
        squared = distributed.squared_gradient_norms(self.parameters)
        norms = component_gradient_norms(squared, self.owner)
        self.record(0, 0.0, {f"audit/grad_norm/{name}": norm for name, norm in norms.items()})
        refuse_dead_components(norms)

    def _metrics(
        self, result: StepResult, num_samples: int, rate: float, elapsed_s: float
    ) -> dict[str, float]:
        return {
            "train/loss": result.loss,
            "train/lr": rate,
            "train/grad_norm": self.engine.gradient_norm(),
            "train/samples_per_s": num_samples / elapsed_s,
            "train/tokens_per_s": result.num_tokens / elapsed_s,
            "memory/peak_gib": peak_memory_gib(),
        }

    def _after_step(self, total: int, per_epoch: int) -> None:
        """Validate and save when it is time; the last step always does both."""
        step, last = self.state.step, self.state.step == total
        every = self.config.validation.every
        due = step % (per_epoch if every == "epoch" else int(every)) == 0
        save_every = self.config.checkpoint.every_steps
        if self.validate is not None and (due or last):
            self._validate(step, step / per_epoch)
            self.save()
        elif last or (save_every and step % save_every == 0) or step % per_epoch == 0:
            self.save()

    def _validate(self, step: int, epoch: float) -> None:
        assert self.validate is not None
        self.engine.evaluation_mode()
        evaluation = self.validate(step)
        self.engine.train_mode()
        metrics = {f"val/{name}": value for name, value in evaluation.metrics.items()}
        self.record(step, epoch, metrics)
        if self.stopping.update(metrics, step):
            self.state.best_metrics = metrics
            self.keep_best(evaluation)
        self.state.stopped_early = self.stopping.should_stop(epoch)
        if self.on_validation is not None:
            self.on_validation(step, metrics)


def peak_memory_gib() -> float:
    """This rank's peak: device memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def state_for_checkpoint(loop: Loop, facts: dict[str, Any]) -> dict[str, Any]:
    """state.json: all a resume needs, and all a person would ask."""
    state = loop.state
    return {
        "step": state.step,
        "position": state.step,
        "epoch": state.step / loop.stream.steps_per_epoch,
        "early_stopping": loop.stopping.state(),
        "best_metrics": state.best_metrics,
        "stopped_early": state.stopped_early,
        **facts,
    }
