"""One adapter in training, with all that is its own: nothing here is once per process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmtrain import distributed
from mmtrain.assemble import Assembled, data_section
from mmtrain.config.schema import RunConfig
from mmtrain.errors import TrainingError
from mmtrain.evaluation.evaluate import Evaluation, recorded_metrics, write_evaluation
from mmtrain.main_rank import on_main
from mmtrain.models.dropout import DropoutScope, scope_of
from mmtrain.tasks.choice import tasks_of
from mmtrain.training.audit import component_gradient_norms, refuse_dead_components
from mmtrain.training.checkpoint import CheckpointFolder, Facts, StoredState, find_damage
from mmtrain.training.early_stopping import EarlyStopping
from mmtrain.training.engine import Engine, Parameters
from mmtrain.training.export import export_trained
from mmtrain.training.optim import learning_rate, parameter_groups, total_steps
from mmtrain.training.recorder import Recorder
from mmtrain.training.session import Session

log = logging.getLogger("mmtrain")
_BAD_IN_ANY_RUN = 10


@dataclass
class RunState:
    """What a checkpoint keeps of the loop: everything that is not a tensor."""

    step: int = 0  # optimizer steps done, which is also the stream's position
    best_metrics: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    bad_samples: int = 0  # left out so far


@dataclass
class Trainee:
    """What trains, how fast, under which masks, how far it is, and where that is written down."""

    config: RunConfig
    run_dir: Path
    recorder: Recorder
    parameters: Parameters
    owner: Mapping[str, str]  # parameter -> block of the run file
    auxiliary: Mapping[str, float]  # further losses of its methods -> weight
    scope: DropoutScope
    stopping: EarlyStopping
    steps_per_epoch: int
    facts: Facts
    state: RunState = field(default_factory=RunState)

    @classmethod
    def of(cls, session: Session, assembled: Assembled, per_epoch: int, facts: Facts) -> Trainee:
        """The one trainee of a run, before its first step."""
        config = session.config
        return cls(
            config=config,
            run_dir=session.run_dir,
            recorder=session.recorder,
            parameters=assembled.trained_parameters(),
            owner=assembled.trainable.owner,
            auxiliary=assembled.trainable.auxiliary,
            scope=scope_of(assembled.model),
            stopping=EarlyStopping.of(config.validation, tasks_of(config)),
            steps_per_epoch=per_epoch,
            facts=facts,
        )

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Where its steps are saved."""
        return CheckpointFolder(self.run_dir, self.config.checkpoint.keep)

    @property
    def total_steps(self) -> int:
        """Optimizer steps from the first to the last."""
        return total_steps(self.config.optim, self.steps_per_epoch)

    @property
    def epoch(self) -> float:
        """Passes over the data that are done."""
        return self.state.step / self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether it has reached its last step, or lost patience."""
        return self.state.step >= self.total_steps or self.state.stopped_early

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh AdamW over what trains."""
        optim = self.config.optim
        groups = parameter_groups(self.parameters, self.owner, self.config.components, optim)
        return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)

    def begin_step(self, engine: Engine) -> float:
        """Key the dropout masks and set the rates of the coming step; the largest rate."""
        step, per_epoch, optim = self.state.step, self.steps_per_epoch, self.config.optim
        self.scope.seed, self.scope.step = self.config.seed, step
        return engine.set_learning_rates(
            lambda peak: learning_rate(peak, step, self.total_steps, per_epoch, optim)
        )

    def audit(self) -> None:
        """Between the first backward and the optimizer: what should train has a gradient."""
        squared = distributed.squared_gradient_norms(self.parameters)
        norms = component_gradient_norms(squared, self.owner)
        self.record({f"audit/grad_norm/{name}": norm for name, norm in norms.items()})
        refuse_dead_components(norms)

    def take_bad_samples(self, count: int) -> None:
        """Count what a step left out, the same on every rank; too many end the run."""
        self.state.bad_samples += count
        if not count:
            return
        share = data_section(self.config).max_bad_share
        seen = self.state.step * self.config.optim.global_batch
        # A bound on few samples would be none at all, or end a run for the first of a million.
        if self.state.bad_samples > max(_BAD_IN_ANY_RUN * (share > 0), share * seen):
            raise TrainingError(
                f"{self.state.bad_samples} of the {seen} samples seen were left out, more than"
                f" data.max_bad_share {share:g}.",
                "The ranks' logs name them with the reason; correct them, or raise the share.",
            )

    def record(self, metrics: Mapping[str, float]) -> None:
        """What was measured at the step that it has reached."""
        self.recorder.record(self.state.step, self.epoch, metrics)

    def validates_now(self) -> bool:
        """After a step: whether a validation is due. The last step always has one."""
        every = self.config.validation.every
        interval = self.steps_per_epoch if every == "epoch" else int(every)
        return self.state.step % interval == 0 or self.state.step == self.total_steps

    def saves_now(self) -> bool:
        """After a step without validation: whether a checkpoint is due."""
        step, every = self.state.step, self.config.checkpoint.every_steps
        due = bool(every) and step % int(every or 1) == 0
        return due or step % self.steps_per_epoch == 0 or step == self.total_steps

    def take_validation(self, evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
        """Record them, keep what is best so far, decide whether to stop; the metrics recorded."""
        metrics = recorded_metrics(evaluations)
        self.record(metrics)
        if self.stopping.update(metrics, self.state.step):
            self.state.best_metrics = metrics
            # The answers that belong to the checkpoint that is exported in the end.
            on_main(lambda: self._keep_answers(evaluations))
        self.state.stopped_early = self.stopping.should_stop(self.epoch)
        return metrics

    def _keep_answers(self, evaluations: Mapping[str, Evaluation]) -> None:
        for name, evaluation in evaluations.items():
            label = f"val-{name}" if name else "val"
            write_evaluation(self.run_dir / "evaluation" / label, evaluation)

    def save(self, engine: Engine) -> None:
        """Write a checkpoint. Every rank takes part."""
        folder, step = self.checkpoints, self.state.step
        if distributed.is_main() and folder.path(step).exists():
            log.info("checkpoint step-%d is written again", step)
        state: StoredState = {
            "step": step,
            "position": step,
            "epoch": self.epoch,
            "early_stopping": self.stopping.state(),
            "best_metrics": self.state.best_metrics,
            "stopped_early": self.state.stopped_early,
            "bad_samples": self.state.bad_samples,
            **self.facts,
        }
        folder.save(engine, self.parameters, state)

    def restore(self, stored: StoredState) -> None:
        """Go on from what a checkpoint's state.json says."""
        self.stopping.restore(stored["early_stopping"])
        self.state = RunState(
            int(stored["step"]),
            stored["best_metrics"],
            stored["stopped_early"],
            stored.get("bad_samples", 0),  # a checkpoint of an older version counted none
        )

    def export(self, assembled: Assembled) -> tuple[int, list[Path]]:
        """Export the best intact checkpoint; its step, and what was written. Rank 0 only."""
        folder, best = self.checkpoints, self.stopping.best_step
        damage = find_damage(folder.path(best)) if best > 0 else None
        if damage is not None:
            log.warning("best checkpoint step-%d is not exported, the last is: %s", best, damage)
        chosen = best if best > 0 and damage is None else self.state.step
        return chosen, export_trained(folder.path(chosen), self.run_dir, self.config, assembled)
