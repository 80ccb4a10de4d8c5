"""Two hosts on one machine: two network namespaces joined by a cable, an sshd in each.

Everything is made here and unmade here: names carry the process number, keys and configuration
lie in a temporary folder, and only processes inside the two namespaces are ever killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}
INTERFACE = "eth7"
_PACKAGES = {
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}
_START_LIMIT_S = 20.0


def why_not() -> str:
    """What is missing on this machine, with the remedy; empty when two hosts can be made."""
    missing = [tool for tool in _PACKAGES if shutil.which(tool, path=_places()) is None]
    if missing:
        packages = dict.fromkeys(_PACKAGES[tool] for tool in missing)
        return f"no {', '.join(missing)} here: apt-get install -y {' '.join(packages)}"
    probe = f"mm{os.getpid()}probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here ({error.stderr.strip()}): run as root, privileged"
    return ""


@dataclass
class TwoHosts:
    """The two hosts, ready for ssh from one to the other."""

    namespaces: dict[str, str]
    folder: Path
    ssh_config: Path
    hostfile: Path
    daemons: dict[str, subprocess.Popen[bytes]]

    def inside(self, host: str) -> list[str]:
        """The words to put before a command so that it runs on this host."""
        return [_tool("ip"), "netns", "exec", self.namespaces[host]]

    def processes(self) -> set[int]:
        """Every process on the two hosts, but for the waiting sshds."""
        found: set[int] = set()
        for namespace in self.namespaces.values():
            found |= set(map(int, _ip("netns", "pids", namespace).split()))
        return found - {daemon.pid for daemon in self.daemons.values()}

    def processes_left(self, limit_s: float) -> set[int]:
        """What still runs on the hosts when the time is over; returns as soon as nothing does."""
        deadline_s = time.monotonic() + limit_s
        while (left := self.processes()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return left


def described(pids: set[int]) -> list[str]:
    """What these processes are, for a failed assertion."""
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            found.append(f"{pid}: {words.decode(errors='replace')}")
    return found


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make the hosts, and unmake them whatever happens."""
    names = {host: f"mm{os.getpid()}{host[-1]}" for host in ADDRESSES}
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    try:
        _make_network(names)
        ssh_config = _make_ssh(folder)
        for host, namespace in names.items():
            daemons[host] = _start_sshd(folder, host, namespace)
        hostfile = folder / "HOSTS"
        hostfile.write_text("# two hosts\n\nhosta slots=1\nhostb slots=1  # the second\n")
        hosts = TwoHosts(names, folder, ssh_config, hostfile, daemons)
        for host in names:
            _wait_until_it_answers(hosts, host)
        yield hosts
    finally:
        for namespace in names.values():
            _unmake(namespace)
        for daemon in daemons.values():
            daemon.wait()


def _places() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _tool(name: str) -> str:
    found = shutil.which(name, path=_places())
    assert found, why_not()
    return found


def _ip(*arguments: str) -> str:
    command = [_tool("ip"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _make_network(names: dict[str, str]) -> None:
    """A cable between the hosts, and one to a network that does not lead to the master."""
    (_, a), (_, b) = names.items()
    for namespace in (a, b):
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
    for interface, network in (("eth3", "10.78.0"), (INTERFACE, "10.77.0")):
        ends = (interface, "type", "veth", "peer", "name", interface, "netns", b)
        _ip("-n", a, "link", "add", *ends)
        for number, namespace in enumerate((a, b), start=1):
            _ip("-n", namespace, "addr", "add", f"{network}.{number}/24", "dev", interface)
            _ip("-n", namespace, "link", "set", interface, "up")


def _make_ssh(folder: Path) -> Path:
    """Keys, known_hosts and the client's configuration, with strict checking of host keys."""
    for name in ("user", *ADDRESSES):
        command = [_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    known = [f"{ADDRESSES[host]} {(folder / f'{host}.pub').read_text()}" for host in ADDRESSES]
    (folder / "known_hosts").write_text("".join(known))
    aliases = "".join(f"Host {host}\n  HostName {ADDRESSES[host]}\n" for host in ADDRESSES)
    config = folder / "ssh_config"
    config.write_text(
        f"{aliases}Host *\n  User root\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking yes\n"
    )
    return config


def _start_sshd(folder: Path, host: str, namespace: str) -> subprocess.Popen[bytes]:
    config = folder / f"sshd_config_{host}"
    config.write_text(
        f"ListenAddress {ADDRESSES[host]}:22\nHostKey {folder}/{host}\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
    )
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    command = [
        _tool("ip"),
        "netns",
        "exec",
        namespace,
        _tool("sshd"),
        "-D",
        "-e",
        "-f",
        str(config),
    ]
    with (folder / f"sshd_{host}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait_until_it_answers(hosts: TwoHosts, host: str) -> None:
    deadline_s = time.monotonic() + _START_LIMIT_S
    probe = f"import socket; socket.create_connection(('{ADDRESSES[host]}', 22), 2).close()"
    command = [*hosts.inside("hosta"), _tool("python3"), "-c", probe]
    while subprocess.run(command, capture_output=True, check=False).returncode != 0:
        log = (hosts.folder / f"sshd_{host}.log").read_text()
        assert time.monotonic() < deadline_s, f"sshd on {host} does not answer:\n{log}"
        time.sleep(0.2)


def _unmake(namespace: str) -> None:
    """Kill what runs in a namespace of ours and remove it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", namespace)
