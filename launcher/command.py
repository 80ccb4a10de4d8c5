"""`mmtrain launch`: start the ranks of a run on this machine or on many."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.environment import environment_files, passed_environment
from launcher.hostfile import Host, parse_hostfile, select_hosts
from launcher.plan import TRAIN_PROGRAM, HostSpec, Job, Master, make_plan
from launcher.ssh import SshSettings, agent_command, destination, master_address
from launcher.supervise import run_launch
from mmtrain.config.yaml_text import read_text
from mmtrain.errors import ConfigError, LaunchError
from mmtrain.resolve import resolve
from mmtrain.safe_text import redact_user_text
from mmtrain.training.run_folder import note_failure

HELP = "start the ranks of a run on this machine or on the hosts of a hostfile"
_EPILOG = """examples:
  mmtrain launch RUN.yaml --ranks 2
  mmtrain launch RUN.yaml optim.lr=1e-4 --hostfile HOSTS
  mmtrain launch RUN.yaml --hostfile HOSTS --include node1@node2:0,1 --master-port 29500
  mmtrain launch RUN.yaml --hostfile HOSTS --dry-run

HOSTS has one line 'host slots=n' per host. Variables of a .deepspeed_env file (NAME=value) in
the home folder or here go to every rank; keep passwords there, never in an override."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mmtrain launch`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("run", metavar="RUN.yaml", help="run file; its text goes to every host")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="overrides of the run file")
    parser.add_argument("--hostfile", help="lines 'host slots=n'; without it: this machine")
    parser.add_argument("--ranks", type=int, help="ranks on this machine; default: one per GPU")
    parser.add_argument("--include", default="", help="use only host:0,1@host2")
    parser.add_argument("--exclude", default="", help="leave out host:0,1@host2")
    parser.add_argument("--master-addr", help="address of the first host, seen by the others")
    parser.add_argument("--master-port", type=int, default=0, help="default: a free port")
    parser.add_argument(
        "--ssh-option", metavar="K=V", action="append", default=[], help="as ssh -o; repeatable"
    )
    parser.add_argument("--ssh-config", metavar="FILE", help="as ssh -F")
    parser.add_argument("--workdir", help="working directory of the ranks; default: this one")
    parser.add_argument("--python", help="python of the ranks; default: this one's path")
    parser.add_argument("--verify-base", action="store_true", help="as in `mmtrain train`")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")


def run(args: argparse.Namespace) -> int:
    """Check the run file once, here; then launch it."""
    world_size = sum(len(host.slots) for host in _hosts(args))
    config = resolve(args.run, args.overrides, world_size)
    try:
        return launch(args, (*TRAIN_PROGRAM, *(["--verify-base"] if args.verify_base else [])))
    except LaunchError as error:
        # Where the run's folder is seen from here. A rank that was killed could not say so.
        note_failure(Path(args.workdir or "", config.run_dir), error.fault)
        raise


def launch(args: argparse.Namespace, program: Sequence[str] = TRAIN_PROGRAM) -> int:
    """Launch any program that joins the process group of its environment (`python -m program`)."""
    settings = SshSettings(args.ssh_config, tuple(args.ssh_option))
    hosts = _hosts(args)
    master, here = _meeting_point(args, hosts, settings)
    specs = make_plan(hosts, _job(args, tuple(program)), master)
    commands = [
        agent_command(spec.host, spec.job.python, settings, local)
        for spec, local in zip(specs, here, strict=True)
    ]
    if args.dry_run:
        print(describe(specs, commands))
        return 0
    return run_launch(specs, commands)


def describe(specs: Sequence[HostSpec], commands: Sequence[list[str]]) -> str:
    """The plan as text; of the environment only the names."""
    job, master = specs[0].job, specs[0].master
    port = str(master.port or "a free port")
    overrides = map(redact_user_text, job.overrides)
    lines = [
        " ".join(["program:", *job.program, job.run_name, *overrides]),
        f"working directory: {job.workdir}",
        f"master: {master.address}, {port}",
        f"environment: {', '.join(sorted(job.environment)) or 'nothing passed'}",
    ]
    for spec, command in zip(specs, commands, strict=True):
        last = spec.first_rank + spec.num_ranks - 1
        devices = "" if spec.devices is None else f" on devices {list(spec.devices)}"
        ranks = f"ranks {spec.first_rank}-{last} of {spec.world_size}{devices}"
        lines.append(f"{spec.host}: {ranks}: {shlex.join(command)}")
    return "\n".join(lines)


def local_rank_count(environ: Mapping[str, str], device_folder: Path = Path("/dev")) -> int:
    """One rank per visible NVIDIA device, or one."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    return max(1, len(list(device_folder.glob("nvidia[0-9]*"))))


def _hosts(args: argparse.Namespace) -> list[Host]:
    """The hosts of the hostfile after the filters, or this machine."""
    if args.hostfile is None:
        return [_this_machine(args)]
    if args.ranks is not None:
        raise ConfigError(["--ranks is for this machine only; set slots in the hostfile"], "launch")
    text = read_text(args.hostfile, "give the path of a hostfile")
    return select_hosts(parse_hostfile(text, args.hostfile), args.include, args.exclude)


def _this_machine(args: argparse.Namespace) -> Host:
    if args.include or args.exclude:
        raise ConfigError(["--include and --exclude need a --hostfile"], "launch")
    ranks = local_rank_count(os.environ) if args.ranks is None else args.ranks
    if ranks < 1:
        raise ConfigError([f"--ranks {ranks}: give 1 or more"], "launch")
    return Host("localhost", tuple(range(ranks)))


def _meeting_point(
    args: argparse.Namespace, hosts: Sequence[Host], settings: SshSettings
) -> tuple[Master, list[bool]]:
    """Where the ranks meet, and which hosts are this machine."""
    given = args.master_addr is not None
    if args.hostfile is None:
        return Master(args.master_addr or "127.0.0.1", args.master_port, given), [True]
    destinations = [destination(host.name, settings) for host in hosts]
    address = args.master_addr or master_address(destinations)
    return Master(address, args.master_port, given), [place.is_here() for place in destinations]


def _job(args: argparse.Namespace, program: tuple[str, ...]) -> Job:
    path = Path(args.run)
    return Job(
        run_name=path.name,
        run_text=path.read_text(encoding="utf-8"),
        overrides=tuple(args.overrides),
        workdir=args.workdir or os.getcwd(),
        python=args.python or sys.executable,
        program=program,
        environment=passed_environment(os.environ, environment_files(os.environ)),
    )
