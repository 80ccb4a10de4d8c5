"""The launcher's side of a launch: start the agents, agree, watch, stop everything."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.agent import GRACE_S
from launcher.messages import ALIVE_EVERY_S, decode, encode
from launcher.plan import HostSpec
from launcher.ssh import explain_failure
from mmtrain.errors import LaunchError

# Time for all hosts to connect, check and answer; a cold python on a slow disk takes a while.
HANDSHAKE_LIMIT_S = 120.0
# What a host gets beyond the ranks' own grace to confirm that they have stopped.
_CONFIRM_S = 10.0
_STDERR_LINES_KEPT = 40


class Interrupted(Exception):
    """A signal asked the launcher to stop."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


@dataclass(frozen=True)
class Failure:
    """A rank that ended badly by itself."""

    host: str
    rank: int
    code: int

    def describe(self) -> tuple[str, str]:
        """The fault and the remedy."""
        who = f"rank {self.rank} on host {self.host}"
        if self.code >= 0:
            remedy = f"Its own lines above, '[{self.host} {self.rank}]', say why."
            return f"{who} exited with code {self.code}; all ranks were stopped.", remedy
        signum = -self.code
        name = signal.Signals(signum).name if signum in set(signal.Signals) else "unknown"
        fault = f"{who} was killed by signal {signum} ({name}); all ranks were stopped."
        if signum == signal.SIGKILL:
            return fault, (
                f"If nobody killed it, the host ran out of memory (dmesg on {self.host}): use a "
                "smaller optim.micro_batch or parallel.deepspeed zero3."
            )
        return fault, f"Its own lines above, '[{self.host} {self.rank}]', may say why."


@dataclass
class Agent:
    """The agent of one host, seen from here."""

    spec: HostSpec
    process: subprocess.Popen[bytes]
    answers: dict[str, dict[str, object]] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def host(self) -> str:
        """The host's name."""
        return self.spec.host

    def send(self, kind: str, **fields: object) -> None:
        """Send a message; an agent that is gone is noticed when its output ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(encode(kind, **fields))
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """End its input: it stops its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


# (agent, what, value): "message" a dict, "noise" and "stderr" a line, "ended" an exit code.
Event = tuple[Agent | None, str, Any]


class Launch:
    """All agents of one launch and what they say."""

    def __init__(self, specs: Sequence[HostSpec], commands: Sequence[list[str]]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.agents: list[Agent] = []
        self.failures: list[Failure] = []
        self._next_alive_s = time.monotonic() + ALIVE_EVERY_S
        self._shows_stderr = False
        for spec, command in zip(specs, commands, strict=True):
            self._start(spec, command)

    def _start(self, spec: HostSpec, command: list[str]) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C reaches the launcher alone, which then stops all hosts in order.
                start_new_session=True,
            )
        except OSError as error:
            self.stop()
            raise LaunchError(
                f"{command[0]} could not be started ({error.strerror}).",
                "Check --python; for other hosts, install the OpenSSH client.",
            ) from None
        agent = Agent(spec, process)
        self.agents.append(agent)
        stderr_reader = threading.Thread(target=self._read_stderr, args=(agent,), daemon=True)
        stderr_reader.start()
        threading.Thread(target=self._read_stdout, args=(agent, stderr_reader), daemon=True).start()

    def _read_stdout(self, agent: Agent, stderr_reader: threading.Thread) -> None:
        assert agent.process.stdout is not None
        for line in agent.process.stdout:
            message = decode(line)
            what = "noise" if message is None else "message"
            self.events.put((agent, what, message or line.decode("utf-8", "replace").rstrip()))
        code = agent.process.wait()
        stderr_reader.join(timeout=2.0)
        self.events.put((agent, "ended", code))

    def _read_stderr(self, agent: Agent) -> None:
        assert agent.process.stderr is not None
        for line in agent.process.stderr:
            self.events.put((agent, "stderr", line.decode("utf-8", "replace").rstrip()))

    def next_event(self, limit_s: float) -> tuple[Agent, str, object] | None:
        """Take in the next event, giving signs of life meanwhile; None when the time is over."""
        deadline_s = time.monotonic() + limit_s
        while True:
            now_s = time.monotonic()
            if now_s >= self._next_alive_s:
                self._next_alive_s = now_s + ALIVE_EVERY_S
                for agent in self.agents:
                    agent.send("alive")
            try:
                wait_s = max(0.0, min(deadline_s, self._next_alive_s) - now_s)
                agent_or_none, what, value = self.events.get(timeout=wait_s)
            except queue.Empty:
                if time.monotonic() >= deadline_s:
                    return None
                continue
            if agent_or_none is None:
                raise Interrupted(value)
            self._take(agent_or_none, what, value)
            return agent_or_none, what, value

    def _take(self, agent: Agent, what: str, value: Any) -> None:
        """Remember or print what an event says."""
        if what == "ended":
            agent.exit_code = value
        elif what == "stderr":
            agent.stderr = [*agent.stderr, value][-_STDERR_LINES_KEPT:]
            if self._shows_stderr:
                _print(f"[{agent.host}] {value}", sys.stderr)
        elif what == "noise":
            _print(f"[{agent.host}] {value}", sys.stderr)
        elif value["kind"] == "output":
            stream = sys.stderr if value["stream"] == "stderr" else sys.stdout
            _print(f"[{agent.host} {value['rank']}] {value['text']}", stream)
        elif value["kind"] == "failed":
            self.failures.append(Failure(agent.host, value["rank"], value["code"]))
        else:
            agent.answers[value["kind"]] = value

    def collect(self, kind: str) -> list[dict[str, Any]]:
        """The answer of this kind from every host; all hosts that cannot give it, in one error."""
        deadline_s = time.monotonic() + HANDSHAKE_LIMIT_S
        while any(not _has_answered(agent, kind) for agent in self.agents):
            if self.next_event(deadline_s - time.monotonic()) is None:
                break
        problems = [_problem(agent, kind) for agent in self.agents if kind not in agent.answers]
        if problems:
            raise LaunchError(" ".join(problems))
        return [agent.answers[kind] for agent in self.agents]

    def agree(self) -> None:
        """Hello, versions, checks on every host; then every host starts its ranks."""
        hellos = self.collect("hello")
        versions = {
            agent.host: hello["versions"] for agent, hello in zip(self.agents, hellos, strict=True)
        }
        check_versions(versions)
        for agent in self.agents:
            agent.send("spec", spec=agent.spec.to_json())
        ready = self.collect("ready")
        self._shows_stderr = True
        for agent in self.agents:
            agent.send("start", master_port=ready[0]["master_port"])

    def watch(self) -> None:
        """Until every host has finished; the first bad end of a rank or host raises."""
        while any(agent.exit_code is None for agent in self.agents):
            event = self.next_event(ALIVE_EVERY_S)
            if event is None:
                continue
            agent, what, _ = event
            if self.failures:
                raise self._failure()
            if what == "ended" and not agent.answers.get("stopped", {}).get("clean"):
                raise LaunchError(_problem(agent, "stopped"))

    def _failure(self) -> LaunchError:
        """Stop, then name the cause: a killed rank makes its peers fail a moment later."""
        self.stop()
        cause = min(self.failures, key=lambda failure: failure.code >= 0)
        fault, remedy = cause.describe()
        others = len(self.failures) - 1
        also = f" {others} more failed with it." if others else ""
        return LaunchError(fault + also, remedy)

    def stop(self) -> None:
        """Stop every host and wait until it says so; never returns with a process of ours left."""
        for agent in self.agents:
            agent.hang_up()
        deadline_s = time.monotonic() + GRACE_S + _CONFIRM_S
        with contextlib.suppress(Interrupted):  # a second Ctrl-C: no more patience
            while any(agent.exit_code is None for agent in self.agents):
                if self.next_event(deadline_s - time.monotonic()) is None:
                    break
        for agent in self.agents:
            if agent.process.poll() is None:
                # Here its ranks die with it; elsewhere the end of input has been sent already.
                agent.process.kill()
                agent.process.wait()
                _print(f"[{agent.host}] did not confirm that its ranks stopped", sys.stderr)


def run_launch(specs: Sequence[HostSpec], commands: Sequence[list[str]]) -> int:
    """Run a plan to its end: 0, or a LaunchError; 128 + signal when a signal stopped it."""
    launch = Launch(specs, commands)
    with _signals_as_events(launch):
        try:
            launch.agree()
            launch.watch()
        except Interrupted as interrupted:
            _print(f"{interrupted}: stopping all hosts", sys.stderr)
            return 128 + interrupted.signum
        finally:
            launch.stop()
    return 0


def check_versions(versions: dict[str, dict[str, str]]) -> None:
    """Refuse hosts that differ: ranks would disagree in ways that hang or, worse, do not."""
    first_host, first = next(iter(versions.items()))
    missing = [name for name in ("mmtrain", "torch", "deepspeed") if first.get(name) == "missing"]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} is not installed on host {first_host}.",
            "Install it there, or name the right python with --python.",
        )
    differences = [
        f"{name} {value} on {host} but {first.get(name, 'missing')} on {first_host}"
        for host, found in versions.items()
        for name, value in found.items()
        if value != first.get(name, "missing")
    ]
    if differences:
        raise LaunchError(
            f"the hosts differ: {'; '.join(differences)}.",
            "Install the same versions on all hosts, or name the right python with --python.",
        )


def _has_answered(agent: Agent, kind: str) -> bool:
    return bool(agent.answers.keys() & {kind, "refused"}) or agent.exit_code is not None


def _problem(agent: Agent, kind: str) -> str:
    """Why a host did not give the answer."""
    if "refused" in agent.answers:
        return str(agent.answers["refused"]["message"])
    if agent.exit_code is None:
        return (
            f"host {agent.host} gave no '{kind}' within {HANDSHAKE_LIMIT_S:.0f} s. "
            f"Check its load and disks, or leave it out with --exclude {agent.host}."
        )
    if kind == "hello":
        python = agent.spec.job.python
        return explain_failure(agent.host, python, agent.exit_code, "\n".join(agent.stderr))
    last = agent.stderr[-1] if agent.stderr else f"exit code {agent.exit_code}"
    return (
        f"the connection to host {agent.host} was lost ({last}); all ranks were stopped. "
        "Check the host and the network, then start the same command again."
    )


@contextlib.contextmanager
def _signals_as_events(launch: Launch) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP arrive in the queue like everything else."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {
        signum: signal.signal(signum, lambda number, _: launch.events.put((None, "signal", number)))
        for signum in handled
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _print(line: str, stream: Any) -> None:
    print(line, file=stream, flush=True)
