"""`mmtrain launch` over two real hosts (network namespaces, sshd, strict host keys)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.netns import ADDRESSES, INTERFACE, TwoHosts, described, two_hosts, why_not
from tests.tiny import AVX2, build_digits, read_metrics, run_data, write_checkpoint, write_run

ROOT = Path(__file__).resolve().parents[2]
RUN_TEXT = "name: two-hosts\n"
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts; in CI a machine that cannot have them is a failure."""
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@dataclass
class Launcher:
    """A launcher running on the first host, its output being read."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Read until the output ends (runs in a thread)."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for_lines(self, text: str, count: int) -> None:
        """Until so many lines hold this text."""
        deadline_s = time.monotonic() + LIMIT_S
        while sum(text in line for line in self.lines) < count:
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.text
            time.sleep(0.05)

    def finish(self) -> int:
        """The exit code, when all output is read."""
        code = self.process.wait(LIMIT_S)
        self.reader.join(10)
        return code

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    @property
    def text(self) -> str:
        """All output so far."""
        return "\n".join(self.lines)

    def seen(self) -> list[dict]:
        """What the ranks reported, in rank order."""
        found = [line.partition("SEEN ")[2] for line in self.lines if "SEEN " in line]
        return sorted(map(json.loads, found), key=lambda report: report["rank"])


def start(hosts: TwoHosts, workdir: Path, *arguments: str) -> Launcher:
    """Launch the small rank program from the first host in this working directory."""
    (workdir / "RUN.yaml").write_text(RUN_TEXT)
    network = ("--hostfile", str(hosts.hostfile), "--ssh-config", str(hosts.ssh_config))
    modules = ("tests.distributed.launch_program", "tests.distributed.rank_program")
    return start_module(hosts, workdir, *modules, "RUN.yaml", *network, *arguments)


def start_module(
    hosts: TwoHosts, workdir: Path, *words: str, variables: dict[str, str] | None = None
) -> Launcher:
    """`python -m …` on the first host in this working directory."""
    process = subprocess.Popen(
        [*hosts.inside("hosta"), sys.executable, "-m", *words],
        cwd=workdir,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Launcher(process)


def test_ranks_sum_over_both_hosts_and_get_every_value_verbatim(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    canary, secret = tmp_path / "canary", "s3cret-canary-value"
    workdir = tmp_path / f"a $(touch {canary}) 'b\" ;c"
    workdir.mkdir(parents=True)  # the canary's slashes make folders of it
    tricks = [
        f"a.first=$(touch {canary})",
        f"a.second='\"; touch {canary}; `touch {canary}` \\ && touch {canary}",
        f"a.third=line one\nline two | touch {canary}",
    ]
    (workdir / ".deepspeed_env").write_text(
        f"# a comment\n\nTEST_TRICK=$(touch {canary}); touch {canary} \"'\nTEST_SECRET={secret}\n"
    )
    launcher = start(hosts, workdir, *tricks, "then=nothing")
    command_lines = _watch_command_lines(hosts, launcher)

    assert launcher.finish() == 0, launcher.text
    reports = launcher.seen()
    assert [report["sum"] for report in reports] == [3.0, 3.0], launcher.text
    assert [report["interface"] for report in reports] == [INTERFACE, INTERFACE]
    for rank, report in enumerate(reports):
        assert report["overrides"] == [*tricks, "then=nothing"]
        assert report["run_text"] == RUN_TEXT and report["workdir"] == str(workdir)
        assert report["environment"]["TEST_TRICK"] == f"$(touch {canary}); touch {canary} \"'"
        assert report["environment"]["TEST_SECRET"] == secret
        assert f"[host{'ab'[rank]} {rank}] SEEN" in launcher.text
    assert not canary.exists()
    assert any("tests.distributed.rank_program" in line for line in command_lines)
    assert not any(secret in line for line in command_lines)
    shown = "\n".join(line for line in launcher.lines if "SEEN" not in line)
    logs = "".join(log.read_text() for log in hosts.folder.glob("*.log"))
    assert secret not in shown + logs
    assert described(hosts.processes_left(10)) == []


def _watch_command_lines(hosts: TwoHosts, launcher: Launcher) -> set[str]:
    """Every command line on the two hosts while the launcher runs."""
    seen: set[str] = set()
    while launcher.process.poll() is None:
        for pid in hosts.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            seen.add(" ".join(word.decode("utf-8", "replace") for word in words))
        time.sleep(0.02)
    return seen


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_killed_rank_stops_everything(hosts: TwoHosts, tmp_path: Path, killed_rank: int) -> None:
    launcher = start(hosts, tmp_path, "then=wait")
    launcher.wait_for_lines("WAITING", 2)
    os.kill(launcher.seen()[killed_rank]["pid"], signal.SIGKILL)

    assert launcher.finish() != 0
    host = "hosta" if killed_rank == 0 else "hostb"
    errors = [line for line in launcher.lines if line.startswith("error:")]
    assert len(errors) == 1
    expected = f"error: rank {killed_rank} on host {host} was killed by signal 9 (SIGKILL)"
    assert errors[0].startswith(expected), launcher.text
    assert described(hosts.processes_left(10)) == []


def test_a_failing_rank_is_named_with_its_code(hosts: TwoHosts, tmp_path: Path) -> None:
    launcher = start(hosts, tmp_path, "then=exit")
    assert launcher.finish() != 0
    assert "error: rank 1 on host hostb exited with code 7" in launcher.text
    assert described(hosts.processes_left(10)) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_leaves_no_orphan(
    hosts: TwoHosts, tmp_path: Path, signum: signal.Signals
) -> None:
    launcher = start(hosts, tmp_path, "then=wait")
    launcher.wait_for_lines("WAITING", 2)
    launcher.process.send_signal(signum)
    expected = -signum if signum == signal.SIGKILL else 128 + signum
    assert launcher.process.wait(LIMIT_S) == expected, launcher.text
    assert described(hosts.processes_left(15)) == []


def test_a_killed_agent_takes_its_ranks_with_it(hosts: TwoHosts, tmp_path: Path) -> None:
    launcher = start(hosts, tmp_path, "then=wait")
    launcher.wait_for_lines("WAITING", 2)
    status = Path(f"/proc/{launcher.seen()[1]['pid']}/status").read_text()
    parent = re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE)
    assert parent
    os.kill(int(parent[1]), signal.SIGKILL)
    assert launcher.finish() != 0
    assert "error: the connection to host hostb was lost" in launcher.text
    left = hosts.processes_left(3)
    assert not [line for line in described(left) if "rank_program" in line]
    for pid in left:  # what the ranks themselves had started; no agent was left to end it
        os.kill(pid, signal.SIGKILL)


def _error_of(launcher: Launcher) -> str:
    """The only error line of a launch that failed before any rank started."""
    assert launcher.finish() != 0
    errors = [line for line in launcher.lines if line.startswith("error:")]
    assert len(errors) == 1 and not launcher.seen() and "Traceback" not in launcher.text
    return errors[0]


@pytest.mark.parametrize(
    ("host_line", "arguments", "expected"),
    [
        # 10.77.0.9 is in the network, but nobody has it.
        ("10.77.0.9", (), r"host 10\.77\.0\.9 is unreachable \(.*\)\. Check"),
        ("no-such-host.invalid", (), "does not resolve|has no address"),
        ("hostb", ("--ssh-option", "IdentityFile=/dev/null"), "login on host hostb was refused"),
        (
            "hostb",
            ("--ssh-option", "UserKnownHostsFile=/dev/null"),
            "host key of hostb is unknown or changed",
        ),
    ],
)
def test_a_host_that_cannot_be_entered_is_named_with_a_remedy(
    hosts: TwoHosts, tmp_path: Path, host_line: str, arguments: tuple[str, ...], expected: str
) -> None:
    hostfile = tmp_path / "HOSTS"
    hostfile.write_text(f"hosta slots=1\n{host_line} slots=1\n")
    if "IdentityFile=/dev/null" in arguments:
        # A given identity is tried besides the configured one: leave the configured one out.
        text = hosts.ssh_config.read_text()
        config = tmp_path / "ssh_config"
        config.write_text(re.sub(r"  IdentityFile .*\n", "", text))
        arguments = (*arguments, "--ssh-config", str(config))
    launcher = start(
        hosts, tmp_path, "--hostfile", str(hostfile), "--ssh-option", "ConnectTimeout=3", *arguments
    )
    assert re.search(expected, _error_of(launcher)), launcher.text


def test_a_missing_python_and_a_busy_port_are_one_line(hosts: TwoHosts, tmp_path: Path) -> None:
    only_b = ("--include", "hostb")
    launcher = start(hosts, tmp_path, *only_b, "--python", "/nowhere/bin/python")
    assert "there is no python at /nowhere/bin/python on host hostb" in _error_of(launcher)

    code = "import socket,time; s=socket.create_server(('',29517)); print(1,flush=True); "
    server = subprocess.Popen(
        [*hosts.inside("hostb"), sys.executable, "-c", f"{code}time.sleep(600)"],
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == b"1\n"
        launcher = start(hosts, tmp_path, *only_b, "--master-port", "29517")
        assert "port 29517 is busy on host hostb" in _error_of(launcher)
    finally:
        server.kill()
        server.wait()


def test_a_missing_working_directory_is_one_line(hosts: TwoHosts, tmp_path: Path) -> None:
    launcher = start(hosts, tmp_path, "--workdir", "/nowhere/at all")
    assert "there is no working directory /nowhere/at all on host hosta" in _error_of(launcher)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, digit shards, and the environment of CPU ranks."""
    folder = tmp_path_factory.mktemp("training")
    write_checkpoint(folder / "base")
    build_digits(folder / "digits")
    # Where this process plays another CPU, its ranks play the same under either launcher.
    cpu = {name: os.environ[name] for name in AVX2 if name in os.environ}
    ranks = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **cpu}
    lines = "".join(f"{name}={value}\n" for name, value in ranks.items())
    (folder / ".deepspeed_env").write_text(lines)
    return folder


def _zero3_run(folder: Path, name: str) -> Path:
    sections = {"parallel": {"deepspeed": "zero3"}, "optim": {"max_steps": 3}}
    return write_run(
        folder, run_data(folder / "base", folder / "digits", folder / name, **sections)
    )


def test_zero3_trains_over_two_hosts(hosts: TwoHosts, training: Path) -> None:
    """By our launcher and by DeepSpeed's: the same losses, bit for bit."""
    run_file = _zero3_run(training, "ours")
    launcher = start_module(
        hosts,
        training,
        *("mmtrain", "launch", str(run_file), "--hostfile", str(hosts.hostfile)),
        *("--ssh-config", str(hosts.ssh_config)),
    )
    assert launcher.finish() == 0, launcher.text
    losses = read_metrics(training / "ours", "train/loss")
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert described(hosts.processes_left(10)) == []

    run_file = _zero3_run(training, "deepspeeds")
    with (training / ".deepspeed_env").open("a") as environment:
        environment.write(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")
    launcher = start_module(
        hosts,
        training,
        *("deepspeed.launcher.runner", "--hostfile", str(hosts.hostfile), "--no_ssh_check"),
        *("--master_addr", ADDRESSES["hosta"], "--module", "mmtrain", "train", str(run_file)),
        variables={"PDSH_SSH_ARGS_APPEND": f"-F {hosts.ssh_config}"},
    )
    assert launcher.finish() == 0, launcher.text
    assert read_metrics(training / "deepspeeds", "train/loss") == losses
