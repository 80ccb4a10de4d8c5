"""Hosts and slots -> what every host has to do, as plain data (pure: nothing is started here)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from launcher.hostfile import Host
from mmtrain.errors import ConfigError

# `python -P -m <program> RUN.yaml overrides…` is what every rank runs. Another program may be
# named where a plan is made: anything that joins the process group of its environment.
TRAIN_PROGRAM = ("mmtrain", "train")
# Quoting has to hold in every login shell, so what some shell reads inside quotes is refused.
_PYTHON_PATH = re.compile(r"[A-Za-z0-9_./~+][A-Za-z0-9_./~+@:=, -]*")


@dataclass(frozen=True)
class Job:
    """What to run, the same on every host."""

    run_name: str
    run_text: str
    overrides: tuple[str, ...]
    workdir: str
    python: str
    program: tuple[str, ...] = TRAIN_PROGRAM
    # Never shown: values may be secrets.
    environment: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Master:
    """Where the ranks meet. Port 0: the first host chooses a free one."""

    address: str
    port: int = 0
    # An address we found has to be one of the first host's own; a given one may be a gateway's.
    given: bool = False


@dataclass(frozen=True)
class HostSpec:
    """What one host has to do; it travels to the host's agent as JSON."""

    host: str
    is_master: bool
    first_rank: int
    num_ranks: int
    world_size: int
    devices: tuple[int, ...] | None
    master: Master
    job: Job

    def to_json(self) -> dict[str, object]:
        """Plain data for the agent."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> HostSpec:
        """The spec an agent received."""
        job = dict(data["job"])
        job.update(overrides=tuple(job["overrides"]), program=tuple(job["program"]))
        devices = None if data["devices"] is None else tuple(data["devices"])
        nested = {"devices": devices, "job": Job(**job), "master": Master(**data["master"])}
        return HostSpec(**{**data, **nested})


def make_plan(hosts: Sequence[Host], job: Job, master: Master) -> list[HostSpec]:
    """One spec per host; ranks are numbered in the order of hosts and slots."""
    check_job(job, master)
    world_size = sum(len(host.slots) for host in hosts)
    specs: list[HostSpec] = []
    first_rank = 0
    for host in hosts:
        specs.append(
            HostSpec(
                host=host.name,
                is_master=not specs,
                first_rank=first_rank,
                num_ranks=len(host.slots),
                world_size=world_size,
                devices=host.slots if host.narrowed else None,
                master=master,
                job=job,
            )
        )
        first_rank += len(host.slots)
    return specs


def rank_environment(spec: HostSpec, local_rank: int, master_port: int) -> dict[str, str]:
    """The variables by which a rank finds its place."""
    place = {
        "RANK": spec.first_rank + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": spec.world_size,
        "LOCAL_WORLD_SIZE": spec.num_ranks,
        "MASTER_ADDR": spec.master.address,
        "MASTER_PORT": master_port,
    }
    return {name: str(value) for name, value in place.items()}


def rank_command(job: Job, run_path: str) -> list[str]:
    """The argument list of a rank. -P: a file in the working directory replaces no module."""
    return [job.python, "-P", "-m", *job.program, run_path, *job.overrides]


def check_job(job: Job, master: Master) -> None:
    """Refuse what could be read as an option or by a shell; every problem at once."""
    problems: list[str] = []
    if not _PYTHON_PATH.fullmatch(job.python):
        problems.append(f"--python '{job.python}': give a plain path without quotes or backslashes")
    if not job.workdir.startswith("/") or "\0" in job.workdir:
        problems.append(f"--workdir '{job.workdir}': give an absolute path")
    for override in job.overrides:
        if override.startswith("-") or "=" not in override or "\0" in override:
            problems.append(f"override '{override}': write it as section.key=value")
    if not 0 <= master.port <= 65535:
        problems.append(f"--master-port {master.port}: give a port from 1 to 65535")
    if problems:
        raise ConfigError(problems, "launch")
