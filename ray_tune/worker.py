"""What runs in a trial's processes: its driver, and the ranks, which train in this process.

The ranks get the same environment as under the launcher (RANK, WORLD_SIZE, MASTER_ADDR, …) and
make their own process group. Ray's torch backend would do that for them, but it imports torch in
the driver and the controller as well: 4 of 11 seconds of a trial's overhead.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ray.train.backend import Backend, BackendConfig

from mmtrain.errors import MmtrainError
from mmtrain.files import lock
from mmtrain.safe_text import redact
from ray_tune.cluster import TRAIN_ENVIRONMENT
from ray_tune.failures import RankFailure, failure_in_words, with_half_batches
from ray_tune.messages import (
    FAILURE,
    FIRST_FAILURE,
    OUTCOME,
    STARTED,
    STEP,
    TRAINING_SECONDS,
)

# A driver that was killed leaves ranks that notice it only after a moment.
_LOCK_WAIT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """What every trial of a study shares; the trial itself is a run file as data."""

    runs: Mapping[str, Mapping[str, object]]
    ranks: int
    resources_per_rank: Mapping[str, float]
    cwd: str
    results_dir: str
    storage: str


class EnvironmentBackend(Backend):
    """Gives the ranks a launcher's environment and nothing else."""

    # As under the launcher, LOCAL_RANK counts among all GPUs of the trial on the machine.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Tell every rank its number and where rank 0 listens."""
        address, port = worker_group.execute_single(0, _rendezvous)
        worker_group.execute(_set_environment, address, port)


@dataclass
class EnvironmentConfig(BackendConfig):
    """Selects EnvironmentBackend."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend's class."""
        return EnvironmentBackend


def _rendezvous() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _set_environment(address: str, port: int) -> None:
    import ray.train

    context = ray.train.get_context()
    os.environ.update(
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def drive_trial(plan: Plan, name: str) -> None:
    """Run one trial's ranks to their end and report what became of it. Runs in Tune's actor.

    A trial that ran out of memory is tried once more, with half as much at a time.
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    from ray import tune

    seconds, failure = _fit(plan, name, name)
    first_failure = ""
    smaller = with_half_batches(plan.runs[name], failure)
    if smaller is not None:
        first_failure = failure
        seconds, failure = _fit(replace(plan, runs={name: smaller}), name, f"{name}-smaller")
    tune.report(
        {OUTCOME: 1, FAILURE: failure, FIRST_FAILURE: first_failure, TRAINING_SECONDS: seconds}
    )


def _fit(plan: Plan, name: str, attempt: str) -> tuple[float, str]:
    """The seconds that training took, and why it failed."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    to_tune: Any = TuneReportCallback()

    trainer = DataParallelTrainer(
        train_rank,
        train_loop_config={"plan": plan, "name": name},
        backend_config=EnvironmentConfig(),
        scaling_config=ScalingConfig(
            num_workers=plan.ranks,
            use_gpu=plan.resources_per_rank.get("GPU", 0) > 0,
            resources_per_worker=dict(plan.resources_per_rank),
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=plan.storage,
            callbacks=[to_tune],
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        return 0.0, failure_in_words(error)
    return result.return_value or 0.0, ""


def train_rank(config: Mapping[str, Any]) -> float:
    """One rank of a trial; the seconds that training took. Runs in a Train worker."""
    import ray.train

    plan, name = config["plan"], config["name"]
    rank, run = int(os.environ["RANK"]), plan.runs[name]
    os.chdir(plan.cwd)
    _write_output_to(Path(run["output_dir"]) / "logs" / f"rank-{rank}.out")
    with _rank_lock(Path(plan.results_dir) / f".{name}.rank-{rank}.lock"):
        ray.train.report({STARTED: 1})
        try:
            return _train(with_threads(run, plan.resources_per_rank["CPU"]), plan.ranks)
        except BaseException as error:
            print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
            kind = "" if isinstance(error, MmtrainError) else f"{type(error).__name__}: "
            raise RankFailure(redact(kind + " ".join(str(error).split()))) from None


def with_threads(run: Mapping[str, object], cpus_per_rank: float) -> Mapping[str, object]:
    """The run with as many threads as its rank has CPUs, unless it says how many.

    A run alone takes all cores of the machine; trials beside each other would fight for them.
    """
    parallel = run.get("parallel") or {}
    if not isinstance(parallel, Mapping) or parallel.get("threads") is not None:
        return run
    return {**run, "parallel": {**parallel, "threads": max(1, int(cpus_per_rank))}}


def _train(run: Mapping[str, object], ranks: int) -> float:
    import ray.train

    from mmtrain.resolve import resolve
    from mmtrain.training.run import run_training

    started_s = time.monotonic()
    run_training(
        resolve(run, (), ranks),
        on_validation=lambda step, metrics: ray.train.report({STEP: step, **metrics}),
    )
    return time.monotonic() - started_s


def _write_output_to(path: Path) -> None:
    """Send what this process prints, libraries included, to the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _rank_lock(path: Path) -> IO[str]:
    """Hold the rank's place: two ranks of a killed and a resumed study must never overlap."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="utf-8")
    if not lock(file, _LOCK_WAIT_S):
        raise RankFailure(f"another process still trains this trial (it holds {path})")
    return file
