"""`mmtrain doctor`: is this machine ready? One line per finding, a remedy per bad one."""

from __future__ import annotations

import argparse
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmtrain.config.schema import DEFAULT_CACHE_GIB
from mmtrain.data.cache import GIB, ShardCache

HELP = "look at versions, accelerator, disk, ports and tools, with a remedy for what is wrong"
EXAMPLES = """examples:
  mmtrain doctor
  mmtrain doctor --path /data/runs
"""
OK, WARNING, FAULT = "ok", "warning", "fault"


# What everything is tested with; the lowest versions that work stand in the package's metadata.
KNOWN_GOOD = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "deepspeed": "0.19.8",
    "webdataset": "1.0.2",
    "ray": "2.60.0",
    "mlflow": "3.17.2",
    "pillow": "13.0.0",
}
WHY_NOT_OLDER = {
    "torch": "older ones run code from weight files",
    "deepspeed": "older ones lose gradients silently",
    "mlflow": "older ones have open security holes",
}
# Where ranks meet by default, and where `mlflow ui` listens.
PORTS = {29500: "MASTER_PORT, where the ranks of a run meet", 5000: "mlflow ui"}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    subject: str
    state: str
    seen: str
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.epilog = EXAMPLES
    parser.add_argument("--path", default=".", help="where runs will be written (default: here)")


def run(args: argparse.Namespace) -> int:
    """Print all findings; non-zero when one is a fault."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = list(examine(Path(args.path)))
    table = Table("what", "state", "seen", "remedy", title="mmtrain doctor")
    colours = {OK: "green", WARNING: "yellow", FAULT: "red"}
    for item in findings:
        state = Text(item.state, style=colours[item.state])
        table.add_row(item.subject, state, Text(item.seen), Text(item.remedy))
    Console(highlight=False).print(table)
    return 1 if any(item.state == FAULT for item in findings) else 0


def examine(path: Path) -> Iterator[Finding]:
    """Every finding about this machine; `path`: where runs will be written."""
    floors = lowest_versions()
    yield python_finding(sys.version_info[:3])
    for name in KNOWN_GOOD:
        yield package_finding(name, _installed(name), floors.get(name, ""))
    yield accelerator_finding(_gpus(), _installed("torch"))
    yield from tool_findings(shutil.which)
    yield disk_finding("disk", path, fault_below=1 * GIB, warning_below=20 * GIB)
    yield disk_finding("shared memory", Path("/dev/shm"), fault_below=0, warning_below=1 * GIB)
    yield cache_finding(ShardCache.at())
    yield from (port_finding(port, use) for port, use in PORTS.items())
    yield host_name_finding(socket.gethostname())
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def lowest_versions() -> dict[str, str]:
    """The version ranges that the installed package asks for, e.g. torch: '>=2.10'."""
    try:
        lines = requires("mmtrain") or []
    except PackageNotFoundError:  # run from a copy of the sources
        return {}
    parsed = (Requirement(line) for line in lines)
    return {item.name: str(item.specifier) for item in parsed if item.marker is None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def python_finding(seen: tuple[int, ...]) -> Finding:
    """Python itself."""
    state = OK if seen >= (3, 11) else FAULT
    return Finding("python", state, ".".join(map(str, seen)), "" if state == OK else "use 3.11")


def package_finding(name: str, seen: str | None, needed: str) -> Finding:
    """A library's version against what is needed and what is known to be good."""
    good = KNOWN_GOOD[name]
    remedy = f"pip install '{name}=={good}'"
    if seen is None:
        return Finding(name, FAULT, "not installed", remedy)
    if not SpecifierSet(needed).contains(seen, prereleases=True):
        why = f"; {WHY_NOT_OLDER[name]}" if name in WHY_NOT_OLDER else ""
        return Finding(name, FAULT, seen, f"needs {needed}{why}: {remedy}")
    if Version(seen).release[:2] != Version(good).release[:2]:
        return Finding(name, WARNING, seen, f"untested; known to work: {good}")
    return Finding(name, OK, seen)


def _gpus() -> list[str] | None:
    """The names of the GPUs that the driver shows; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def accelerator_finding(gpus: list[str] | None, torch_version: str | None) -> Finding:
    """GPUs, and whether this torch can use them."""
    if gpus is None:
        remedy = "fine for small models; for 7B run on a machine with NVIDIA GPUs"
        return Finding("accelerator", OK, "none, the CPU is used", remedy)
    if not gpus:
        remedy = "nvidia-smi fails or lists none: repair the driver, or pass the GPUs in"
        return Finding("accelerator", FAULT, "a driver without GPUs", remedy)
    seen = f"{len(gpus)} x {gpus[0]}"
    if "+cpu" in (torch_version or ""):
        return Finding("accelerator", FAULT, seen, "this torch is for CPUs: install the CUDA build")
    return Finding("accelerator", OK, seen)


def tool_findings(which: Callable[[str], str | None]) -> Iterator[Finding]:
    """Programs that `mmtrain launch` needs for more than one host."""
    for name, package in {"ssh": "openssh-client", "ip": "iproute2"}.items():
        found = which(name)
        if found:
            yield Finding(name, OK, found)
        else:
            remedy = f"install {package} to launch on several hosts"
            yield Finding(name, WARNING, "not found", remedy)


def disk_finding(subject: str, path: Path, fault_below: int, warning_below: int) -> Finding:
    """Free space of the disk that holds a path."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(subject, WARNING, f"{path}: {error.strerror}", "name a folder that exists")
    seen = f"{path}: {free / GIB:.1f} GiB free"
    if free < fault_below:
        return Finding(subject, FAULT, seen, "free some space, or set output_dir to another disk")
    if free < warning_below:
        return Finding(
            subject, WARNING, seen, f"less than {warning_below / GIB:.0f} GiB: free some"
        )
    return Finding(subject, OK, seen)


def cache_finding(cache: ShardCache) -> Finding:
    """Where shards of URLs are kept, unless data.cache_dir says otherwise, against its bound."""
    held, free = cache.held_bytes / GIB, cache.free_bytes / GIB
    seen = f"{cache.folder}: {held:.1f} GiB, {free:.1f} GiB free"
    if held + free < DEFAULT_CACHE_GIB:
        remedy = (
            f"less than data.cache_gib's {DEFAULT_CACHE_GIB:.0f} GiB: to train on URLs lower it, or"
            " set data.cache_dir to a larger disk"
        )
        return Finding("shard cache", OK, seen, remedy)
    return Finding("shard cache", OK, seen)


def port_finding(port: int, use: str) -> Finding:
    """Whether a port can be listened on."""
    subject = f"port {port}"
    with socket.socket() as probe:
        # As servers do: a connection that just ended does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return Finding(subject, WARNING, str(error.strerror), f"taken ({use}): choose another")
    return Finding(subject, OK, f"free ({use})")


def host_name_finding(name: str) -> Finding:
    """Ranks find each other by name."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"add a line '127.0.0.1 {name}' to /etc/hosts"
        return Finding("host name", FAULT, f"{name}: {error.strerror}", remedy)
    return Finding("host name", OK, f"{name} is {address}")


def open_files_finding(limit: int) -> Finding:
    """A study holds many connections and shards open."""
    if limit != resource.RLIM_INFINITY and limit < 4096:
        return Finding("open files", WARNING, f"at most {limit}", "ulimit -n 65536")
    return Finding("open files", OK, f"at most {limit}")
