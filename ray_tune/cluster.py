"""A private Ray on this machine, closed to others, or a cluster that is already there."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from mmtrain.errors import LaunchError
from ray_tune.study import Study

TRIAL_SLOT = "trial_slot"
_HEAD_NODE = "node:__internal_head__"
_OBJECT_STORE_BYTES = 128 * 2**20  # only small dictionaries pass through Ray

# Train v2 spends most of a short trial in polling, watchers and log set-up that we do not use.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # A trial may wait for others' resources; we report that ourselves.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextmanager
def ray_session(address: str | None, num_trials: int, lock: IO[str]) -> Iterator[Path]:
    """Ray, started or joined, and ended or left; yields a folder for its temporary files."""
    _remove_leftover(lock)
    # Short: Ray's sockets lie in it, and a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mmtrain-ray-", dir=_short_temporary_folder()))
    _remember(lock, folder)
    os.environ.update(TRAIN_ENVIRONMENT)
    os.environ.update(_DRIVER_ENVIRONMENT)
    if address is None:
        os.environ.update(private_environment(folder / "token"))
    import ray

    try:
        _connect(ray, address, num_trials, folder)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def private_environment(token: Path) -> dict[str, str]:
    """Only this user's processes with this token may talk to Ray, and only on this machine."""
    descriptor = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(_token())
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Despite its name: without cluster mode Ray binds every port to the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A head that is gone does not come back: helpers need not look for it for a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    }


@cache
def _token() -> str:
    """One a process: of a second session, Ray would still show the first one's."""
    return secrets.token_hex(32)


def private_folder(path: Path) -> Path:
    """Only its user may look in: Ray keeps the study there, a password in it included."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def _connect(ray: Any, address: str | None, num_trials: int, folder: Path) -> None:
    quiet = {
        "log_to_driver": False,
        "configure_logging": False,
        "logging_level": logging.CRITICAL,
    }
    if address is None:
        # "local", because a stale cluster file makes a plain init join a dead cluster.
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            resources={TRIAL_SLOT: num_trials},
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            **quiet,
        )
        return
    check_address(address)
    path = os.environ.get("PYTHONPATH", "")
    environment = {"env_vars": {"PYTHONPATH": path}} if path else None
    try:
        ray.init(address=address, runtime_env=environment, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"cannot join the Ray cluster at '{address}' ({str(error).splitlines()[0]}).",
            "Check the address; leave --address out to run on this machine alone.",
        ) from error


def check_address(address: str) -> None:
    """An error at once where nobody listens: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise LaunchError(
            f"--address {address}: not an address of the form HOST:PORT.",
            "Give the address that `ray start --head` printed, on a host of the cluster.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"no Ray cluster answers at {address} ({error}).",
            "Check the address; leave --address out to run on this machine alone.",
        ) from error


def driver_resources(totals: Mapping[str, float]) -> dict[str, float]:
    """What a trial's driver asks for: no core, but Ray refuses a request for nothing at all."""
    if TRIAL_SLOT in totals:
        return {"CPU": 0, TRIAL_SLOT: 1}
    return {"CPU": 0, _HEAD_NODE: 0.001}


def rank_resources(study: Study, totals: Mapping[str, float]) -> dict[str, float]:
    """What one rank occupies on this cluster."""
    gpu = study.resources_per_rank.gpu
    if gpu is None:
        gpu = 1.0 if totals.get("GPU", 0) >= 1 else 0.0
    return {"CPU": study.resources_per_rank.cpu, **({"GPU": gpu} if gpu else {})}


def trials_at_a_time(study: Study, totals: Mapping[str, float]) -> int:
    """How many trials fit beside each other; an error where not even one does."""
    wanted = wanted_resources(study, totals)
    fitting = int(min(totals.get(name, 0) / amount for name, amount in wanted.items()) + 1e-9)
    if fitting < 1:
        raise LaunchError(
            f"one trial wants {in_words(wanted)}, Ray has {in_words(totals, wanted)}.",
            "Lower ranks_per_trial or resources_per_rank in the study, or use a larger cluster.",
        )
    return min(fitting, study.max_concurrent or fitting)


def wanted_resources(study: Study, totals: Mapping[str, float]) -> dict[str, float]:
    """What one trial's ranks occupy together."""
    ranks = study.ranks_per_trial
    return {name: amount * ranks for name, amount in rank_resources(study, totals).items()}


def in_words(resources: Mapping[str, float], names: Mapping[str, float] | None = None) -> str:
    """`2 CPU, 1 GPU`; only the resources named, if any are."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names or resources)


def _short_temporary_folder() -> str | None:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 else "/tmp"


def _remember(lock: IO[str], folder: Path) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(str(folder))
    lock.flush()


def _remove_leftover(lock: IO[str]) -> None:
    """Delete the temporary folder of a driver that was killed; its Ray died with it."""
    lock.seek(0)
    left = Path(lock.read().strip() or "/nonexistent")
    if left.name.startswith("mmtrain-ray-") and left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
