"""The launcher's hand on one host: `python -P -m launcher.agent`, started directly or by ssh.

It says hello with its versions, receives what to do on standard input, checks what can be checked
before any rank starts, then starts the ranks and forwards their output. When standard input ends
(the launcher stopped, was killed, or the connection broke) it stops its ranks: no orphans.
"""

from __future__ import annotations

import importlib.metadata
import os
import select
import selectors
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

from launcher.messages import SILENCE_LIMIT_S, decode, encode
from launcher.plan import HostSpec, rank_command, rank_environment
from launcher.ranks import Rank, Stream, adopt_orphans, kill_children, start_rank
from launcher.run_file_folder import run_file_folder
from mmtrain import network
from mmtrain.errors import LaunchError

COMPARED_PACKAGES = ("mmtrain", "torch", "deepspeed", "transformers", "peft")
# What a stopped rank gets to put its last words and files in order before SIGKILL.
GRACE_S = 10.0
_TICK_S = 0.2
_DRAIN_READS = 64


class Wire:
    """The line to the launcher: messages out on standard output, in on standard input."""

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self.fd_in, self.fd_out = fd_in, fd_out
        self.lost = False
        self._pending = b""
        self._messages: list[dict[str, object]] = []
        self._heard_s = time.monotonic()

    def send(self, kind: str, **fields: object) -> None:
        """Send one message; a launcher that is gone makes the wire lost, nothing else."""
        data = encode(kind, **fields)
        try:
            while data and not self.lost:
                data = data[os.write(self.fd_out, data) :]
        except OSError:
            self.lost = True

    def read(self) -> None:
        """Take what has arrived; the end of input, or silence for too long, makes it lost."""
        if select.select([self.fd_in], [], [], 0)[0]:
            data = os.read(self.fd_in, 1 << 16)
            self.lost = self.lost or not data
            self._heard_s = time.monotonic()
            *lines, self._pending = (self._pending + data).split(b"\n")
            self._messages += [message for line in lines if (message := decode(line))]
        elif time.monotonic() - self._heard_s > SILENCE_LIMIT_S:
            self.lost = True

    def forget(self) -> None:
        """Drop what has arrived and nobody asks for."""
        self._messages.clear()

    def wait_for(self, kind: str) -> dict[str, Any] | None:
        """The next message of this kind, or None when the launcher is gone."""
        while not self.lost:
            while self._messages:
                message = self._messages.pop(0)
                if message["kind"] == kind:
                    return message
            select.select([self.fd_in], [], [], 1.0)
            self.read()
        return None


@dataclass
class StopFlag:
    """Set by SIGTERM, SIGINT or SIGHUP."""

    raised: bool = False

    def install(self) -> None:
        """From now on a signal asks for an orderly stop."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: setattr(self, "raised", True))


def versions() -> dict[str, str]:
    """What has to be equal on all hosts, without importing any of it."""
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in COMPARED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def prepare(spec: HostSpec) -> tuple[str, int]:
    """Check this host; the interface that reaches the master, and the port on the master host."""
    if not os.path.isdir(spec.job.workdir):
        raise LaunchError(
            f"there is no working directory {spec.job.workdir} on host {spec.host}.",
            "Create it there, or name another with --workdir.",
        )
    address = network.resolve(spec.master.address)
    port = _master_port(spec, address) if spec.is_master else spec.master.port
    return network.interface_towards(address), port


def _master_port(spec: HostSpec, address: str) -> int:
    """The port the ranks will meet at, checked to be free."""
    if not spec.master.given and not network.is_local(address):
        raise LaunchError(
            f"{address} is not an address of host {spec.host}, the first host.",
            "Name one that the other hosts can reach with --master-addr.",
        )
    port = spec.master.port or network.free_port()
    if not network.port_is_free(port):
        raise LaunchError(
            f"port {port} is busy on host {spec.host}.",
            "Choose another with --master-port, or leave the option out to take a free one.",
        )
    return port


def host_environment(spec: HostSpec, interface: str) -> dict[str, str]:
    """What all ranks of this host share."""
    shared = {**os.environ, **spec.job.environment}
    shared.setdefault("GLOO_SOCKET_IFNAME", interface)
    # '=' asks NCCL for exactly this name, where a bare one is a prefix.
    shared.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    shared["PYTHONUNBUFFERED"] = "1"
    if spec.devices is not None:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.devices))
    return shared


def start_all(spec: HostSpec, interface: str, port: int, run_path: str) -> list[Rank]:
    """Start every rank of this host."""
    shared = host_environment(spec, interface)
    ranks: list[Rank] = []
    try:
        for local_rank in range(spec.num_ranks):
            environment = {**shared, **rank_environment(spec, local_rank, port)}
            number = spec.first_rank + local_rank
            command = rank_command(spec.job, run_path)
            ranks.append(start_rank(number, command, environment, spec.job.workdir))
    except OSError as error:
        raise LaunchError(
            f"a rank could not be started on host {spec.host} ({error}).",
            "Check --python and --workdir.",
        ) from None
    return ranks


class Watch:
    """The loop over running ranks: forward output, report failures, stop what must stop."""

    def __init__(self, wire: Wire, ranks: list[Rank], stop: StopFlag) -> None:
        self.wire, self.running, self.stop_flag = wire, list(ranks), stop
        self.failed, self.listening = False, True
        self.stopping_since_s: float | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(wire.fd_in, selectors.EVENT_READ)
        for rank in ranks:
            for stream in rank.streams:
                self.selector.register(stream.pipe, selectors.EVENT_READ, (rank, stream))

    def run(self) -> bool:
        """Until no rank runs; True if all of them ended well by themselves."""
        while self.running:
            for key, _ in self.selector.select(_TICK_S):
                if key.data is not None:
                    self._forward(*key.data)
            self._listen()
            self._reap()
            self._stop_if_needed()
        return not self.failed and self.stopping_since_s is None

    def _listen(self) -> None:
        """Notice whether the launcher is still there; its signs of life carry nothing else."""
        if self.listening:
            self.wire.read()
            self.wire.forget()
        if self.listening and self.wire.lost:
            self.listening = False
            self.selector.unregister(self.wire.fd_in)

    def _forward(self, rank: Rank, stream: Stream) -> bool:
        """Send the lines that are ready; False when nothing more can come."""
        lines, more = stream.read_lines()
        self._send(rank, stream, lines)
        if not more:
            self.selector.unregister(stream.pipe)
            rank.streams.remove(stream)
        return more

    def _send(self, rank: Rank, stream: Stream, lines: list[str]) -> None:
        for line in lines:
            self.wire.send("output", rank=rank.number, stream=stream.name, text=line)

    def _reap(self) -> None:
        """Take leave of the ranks that have ended; report failures, signals first."""
        ended = [(rank, code) for rank in self.running if (code := rank.reap()) is not None]
        for rank, code in sorted(ended, key=lambda pair: pair[1]):
            self._drain(rank)
            self.running.remove(rank)
            if code != 0 and self.stopping_since_s is None:
                self.failed = True
                self.wire.send("failed", rank=rank.number, code=code)

    def _drain(self, rank: Rank) -> None:
        """The last words of a rank that has ended."""
        for stream in list(rank.streams):
            for _ in range(_DRAIN_READS):
                if not select.select([stream.pipe], [], [], 0)[0] or not self._forward(
                    rank, stream
                ):
                    break
            else:
                self._send(rank, stream, ["… output cut: the rank has ended"])
            if stream in rank.streams:  # a process outside the group still holds the pipe
                self._send(rank, stream, stream.flush())
                self.selector.unregister(stream.pipe)

    def _stop_if_needed(self) -> None:
        """SIGTERM once there is a reason, SIGKILL when the grace is over."""
        if self.stopping_since_s is None:
            if self.failed or self.wire.lost or self.stop_flag.raised:
                self.stopping_since_s = time.monotonic()
                self._signal_all(signal.SIGTERM)
        elif time.monotonic() - self.stopping_since_s > GRACE_S:
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, signum: int) -> None:
        for rank in self.running:
            rank.signal_group(signum)


def main() -> int:
    """One launch on this host, from hello to the last rank."""
    wire = Wire(sys.stdin.fileno(), sys.stdout.fileno())
    wire.send("hello", versions=versions())
    received = wire.wait_for("spec")
    if received is None:
        return 1
    spec = HostSpec.from_json(received["spec"])
    try:
        interface, port = prepare(spec)
        wire.send("ready", master_port=port, interface=interface)
        start = wire.wait_for("start")
        return _run(wire, spec, interface, start["master_port"]) if start else 1
    except LaunchError as error:
        wire.send("refused", message=str(error))
        return 1


def _run(wire: Wire, spec: HostSpec, interface: str, port: int) -> int:
    """Start the ranks and watch them; the run file lives as long as they do."""
    stop = StopFlag()
    stop.install()
    adopt_orphans()
    with run_file_folder() as folder:
        run_path = folder / spec.job.run_name
        run_path.write_text(spec.job.run_text, encoding="utf-8")
        try:
            ranks = start_all(spec, interface, port, str(run_path))
            clean = Watch(wire, ranks, stop).run()
        finally:
            kill_children()
    wire.send("stopped", clean=clean)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
