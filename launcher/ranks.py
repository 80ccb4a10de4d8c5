"""The ranks of one host: each in its own session, none left behind.

Linux kills a rank when the agent dies (PR_SET_PDEATHSIG), whatever the agent dies of. What a rank
started is killed when the rank ends: its process group at once, and what left the group falls to
the agent (PR_SET_CHILD_SUBREAPER), which clears it away before it leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_READ_BYTES = 1 << 16
# A rank that prints without line ends is cut here, so that its output cannot fill the memory.
MAX_LINE_BYTES = 1 << 16
_LINE_END = re.compile(rb"\r?\n|\r")


@dataclass
class Stream:
    """One output of a rank, cut into lines."""

    name: str
    pipe: IO[bytes]
    pending: bytes = b""

    def read_lines(self) -> tuple[list[str], bool]:
        """The lines that are complete now, and whether more may come."""
        try:
            data = os.read(self.pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return [], True
        if not data:
            return self.flush(), False
        *lines, self.pending = _LINE_END.split(self.pending + data)
        if len(self.pending) > MAX_LINE_BYTES:
            lines, self.pending = [*lines, self.pending], b""
        return [line.decode("utf-8", "replace") for line in lines], True

    def flush(self) -> list[str]:
        """The last line, if it has no end."""
        rest, self.pending = self.pending, b""
        return [rest.decode("utf-8", "replace")] if rest else []


@dataclass
class Rank:
    """A running rank and its outputs."""

    number: int
    process: subprocess.Popen[bytes]
    streams: list[Stream] = field(default_factory=list)

    def signal_group(self, signum: int) -> None:
        """Signal the rank and everything it started; its process group is its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def reap(self) -> int | None:
        """The exit code once it has ended (negative: its signal), after clearing its group."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self.process.pid, options) is None:
            return None
        # Not yet waited for, the rank still owns its process group number: this hits no stranger.
        self.signal_group(signal.SIGKILL)
        return self.process.wait()


def start_rank(
    number: int, command: Sequence[str], environment: Mapping[str, str], workdir: str
) -> Rank:
    """Start one rank in a session of its own, bound to the life of this process."""
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=workdir,
        env=dict(environment),
        start_new_session=True,
        # Safe: the agent has one thread.
        preexec_fn=die_with_parent(os.getpid()),
    )
    rank = Rank(number, process)
    for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        rank.streams.append(Stream(name, pipe))
    return rank


def die_with_parent(parent: int) -> Callable[[], None]:
    """What a child calls before it becomes the rank: SIGKILL when the parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above took effect
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


def adopt_orphans() -> None:
    """From now on, what a rank leaves running becomes a child of this process."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_children() -> None:
    """Kill every child of this process, the adopted ones too, until there is none."""
    while children := Path("/proc/thread-self/children").read_text().split():
        for child in map(int, children):
            os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
            os.waitpid(child, 0)
