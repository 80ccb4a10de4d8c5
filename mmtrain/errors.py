"""The errors a user may see: the fault, the value seen, and the remedy.

Everything a user can cause or cure is a `MmtrainError`; the command line prints it on one line
and exits non-zero. Any other exception is a bug of ours and keeps its traceback. Every text
passes through `presentable` here: whatever of a user's input it repeats, no secret is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from mmtrain.safe_text import presentable

_MAX_LISTED_PROBLEMS = 100


class MmtrainError(Exception):
    """A fault the user can act on. `remedy` says what to do about it."""

    exit_code = 2

    def __init__(self, fault: str, remedy: str = "") -> None:
        self.fault = presentable(" ".join(fault.split()))
        self.remedy = presentable(" ".join(remedy.split()))
        super().__init__(f"{self.fault} {self.remedy}".strip())


class ConfigError(MmtrainError):
    """One or more wrong values in a run or study file; `problems` lists every one of them."""

    def __init__(self, problems: Iterable[str], source: str = "configuration") -> None:
        self.problems = [presentable(problem) for problem in problems]
        self.source = source
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}")

    def __str__(self) -> str:
        listed = self.problems[:_MAX_LISTED_PROBLEMS]
        left_out = len(self.problems) - len(listed)
        more = [f"and {left_out} more"] if left_out else []
        return "\n  - ".join([self.fault, *listed, *more])

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        return type(self), (self.problems, self.source)


class DataError(MmtrainError):
    """A shard, sample or raw file that cannot be trusted."""


class CheckpointError(MmtrainError):
    """A checkpoint or base model folder that cannot be used."""


class TrainingError(MmtrainError):
    """Training stopped by a check of ours (no gradient, NaN, out of memory)."""

    exit_code = 3


class LaunchError(MmtrainError):
    """A host or rank that could not be started or that failed."""

    exit_code = 4


class Terminated(BaseException):
    """SIGTERM arrived. No `Exception`: nothing that goes on after errors may go on after this."""

    def __init__(self) -> None:
        super().__init__("stopped by SIGTERM")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest valid one, or the whole list."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else "nothing is valid here"
