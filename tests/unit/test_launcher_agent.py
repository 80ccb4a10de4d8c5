"""The agent and its ranks on this machine, as real processes without torch."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import agent as agent_module
from launcher.agent import Wire
from launcher.hostfile import Host
from launcher.messages import decode, encode
from launcher.plan import Job, Master, make_plan
from launcher.ranks import MAX_LINE_BYTES, Stream
from launcher.run_file_folder import remove_abandoned
from mmtrain import network

LIMIT_S = 30.0
AGENT = "from launcher import agent; agent.GRACE_S = {grace_s}; raise SystemExit(agent.main())"


class AgentProcess:
    """An agent with a rank program given as source text."""

    def __init__(
        self, folder: Path, source: str, ranks: int = 2, grace_s: float = 10.0, **master: Any
    ) -> None:
        (folder / "rank_source.py").write_text(source)
        job = Job(
            "RUN.yaml",
            "name: x\n",
            ("a=b",),
            str(folder),
            sys.executable,
            ("rank_source",),
            {"PYTHONPATH": str(folder)},
        )
        master = {"address": "127.0.0.1", **master}
        spec = make_plan([Host("here", tuple(range(ranks)))], job, Master(**master))[0]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", AGENT.format(grace_s=grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        assert self.next("hello")["versions"]["python"]
        self.send("spec", spec=spec.to_json())

    def send(self, kind: str, **fields: Any) -> None:
        self.stdin.write(encode(kind, **fields))
        self.stdin.flush()

    def start(self) -> None:
        self.send("start", master_port=self.next("ready")["master_port"])

    def next(self, kind: str) -> dict[str, Any]:
        for line in self.stdout:
            message = decode(line)
            assert message is not None, line
            if message["kind"] == kind:
                return message
        raise AssertionError(f"the agent ended without '{kind}'")

    def rest(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout]


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    started: list[AgentProcess] = []

    def start(source: str, **arguments: Any) -> AgentProcess:
        started.append(AgentProcess(tmp_path, source, **arguments))
        return started[-1]

    yield start
    for made in started:
        made.process.kill()
        made.process.wait()
        made.stdin.close()
        made.stdout.close()


def _is_gone(pid: int) -> bool:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        try:
            status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if status == "Z":
            return True
        time.sleep(0.05)
    return False


WAITING = """
import os, subprocess, time
inside = subprocess.Popen(["sleep", "600"])
outside = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), inside.pid, outside.pid, flush=True)
time.sleep(600)
"""


def _pids(made: AgentProcess, ranks: int = 2) -> list[list[int]]:
    return [list(map(int, made.next("output")["text"].split())) for _ in range(ranks)]


def test_output_reaches_the_launcher_line_by_line(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    source = (
        "import os, sys\n"
        "print('out', os.environ['RANK'], os.environ['GLOO_SOCKET_IFNAME'], sys.argv[2:])\n"
        "sys.stderr.write('bar 1\\rbar 2\\nlast words without an end')\n"
        'print(\'{"kind": "stopped", "clean": true}\')\n'
        "print(open(sys.argv[1]).read(), end='')\n"
    )
    made = start_agent(source)
    made.start()
    messages = made.rest()
    outputs = [m for m in messages if m["kind"] == "output"]
    for rank in (0, 1):
        texts = {
            stream: [m["text"] for m in outputs if (m["rank"], m["stream"]) == (rank, stream)]
            for stream in ("stdout", "stderr")
        }
        # What a rank prints stays output, even when it looks like a message.
        spoof = '{"kind": "stopped", "clean": true}'
        assert texts["stdout"] == [f"out {rank} lo ['a=b']", spoof, "name: x"]
        assert texts["stderr"] == ["bar 1", "bar 2", "last words without an end"]
    assert messages[-1] == {"kind": "stopped", "clean": True}
    assert made.process.wait(LIMIT_S) == 0


def test_a_killed_rank_is_reported_and_all_it_and_its_peers_started_is_gone(
    start_agent: Callable[..., AgentProcess],
) -> None:
    made = start_agent(WAITING)
    made.start()
    pids = _pids(made)
    os.kill(pids[0][0], signal.SIGKILL)
    assert made.next("failed")["code"] == -signal.SIGKILL
    assert made.process.wait(LIMIT_S) == 1
    assert all(_is_gone(pid) for group in pids for pid in group)


@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_a_stopped_agent_leaves_nothing(start_agent: Callable[..., AgentProcess], how: str) -> None:
    made = start_agent(WAITING)
    made.start()
    pids = _pids(made)
    if how == "SIGTERM":
        made.process.terminate()
    else:
        made.stdin.close()
    assert made.process.wait(LIMIT_S) == 1
    assert all(_is_gone(pid) for group in pids for pid in group)


def test_a_rank_that_ignores_sigterm_is_killed(
    start_agent: Callable[..., AgentProcess],
) -> None:
    source = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    made = start_agent(source, ranks=1, grace_s=1.0)
    made.start()
    ((pid,),) = _pids(made, ranks=1)
    started_s = time.monotonic()
    made.stdin.close()
    assert made.process.wait(LIMIT_S) == 1 and _is_gone(pid)
    assert time.monotonic() - started_s >= 1.0


def test_a_killed_agent_takes_its_ranks_with_it_and_the_next_one_clears_its_folder(
    start_agent: Callable[..., AgentProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    (temporary / "others").mkdir(parents=True)
    (temporary / "others" / "kept").touch()
    (temporary / "mmtrain-launch-link").symlink_to(temporary / "others")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    made = start_agent(WAITING)
    made.start()
    pids = _pids(made)
    try:
        (left,) = temporary.glob("mmtrain-launch-*/RUN.yaml")
        remove_abandoned()
        assert left.exists(), "its agent lives"
        made.process.kill()
        made.process.wait()
        assert all(_is_gone(group[0]) for group in pids)
        assert left.exists()
        following = start_agent("", ranks=1)
        following.start()
        assert following.rest()[-1]["clean"]
        assert {path.name for path in temporary.iterdir()} == {"mmtrain-launch-link", "others"}
        assert (temporary / "others" / "kept").exists()
    finally:
        for group in pids:  # what a rank started outlives an agent that was killed outright
            for pid in group[1:]:
                os.kill(pid, signal.SIGKILL)


def test_a_busy_port_and_a_foreign_master_are_refused(
    start_agent: Callable[..., AgentProcess],
) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not network.port_is_free(port)
        refused = start_agent("", port=port).next("refused")["message"]
        assert f"port {port} is busy on host here" in refused and "--master-port" in refused
    refused = start_agent("", address="192.0.2.77").next("refused")["message"]
    assert "192.0.2.77" in refused and "--master-addr" in refused


def test_silence_and_end_of_input_make_the_wire_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "SILENCE_LIMIT_S", 0.2)
    read_end, write_end = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    wire = Wire(read_end, null)
    os.write(write_end, encode("alive") + b"a banner\n" + encode("start", master_port=1)[:5])
    wire.read()
    assert not wire.lost
    os.write(write_end, encode("start", master_port=1)[5:])
    assert wire.wait_for("start") == {"kind": "start", "master_port": 1}
    assert wire.wait_for("never") is None and wire.lost

    monkeypatch.setattr(agent_module, "SILENCE_LIMIT_S", 600.0)
    wire = Wire(read_end, null)
    os.close(write_end)
    wire.read()
    assert wire.lost
    os.close(read_end)
    os.close(null)


def test_a_line_without_end_is_bounded() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with os.fdopen(read_end, "rb") as pipe:
        stream = Stream("stdout", pipe)
        os.write(write_end, b"x" * 40_000)
        assert stream.read_lines() == ([], True)
        os.write(write_end, b"x" * 40_000)
        while not (lines := stream.read_lines()[0]):
            select.select([pipe], [], [], 1)
        assert MAX_LINE_BYTES < len(lines[0]) <= 80_000
        os.close(write_end)


def test_the_interface_is_the_one_that_holds_the_address() -> None:
    held = dict(reversed(list(network.interface_addresses())))
    assert network.interface_towards("127.0.0.1") == "lo"
    for interface, address in held.items():
        if not address.startswith("fe80"):
            assert network.interface_towards(address) in held and network.is_local(address)
    assert not network.is_local("192.0.2.77")
