"""The errors a user may see: the fault, the value seen, and the remedy.

Everything a user can cause or cure is a `MmtrainError`; the command line prints it on one line
and exits non-zero. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MmtrainError(Exception):
    """A fault the user can act on. `remedy` says what to do about it."""

    exit_code = 2

    def __init__(self, fault: str, remedy: str = "") -> None:
        self.fault = fault.strip()
        self.remedy = remedy.strip()
        super().__init__(f"{self.fault} {self.remedy}".strip())


class ConfigError(MmtrainError):
    """One or more wrong values in a run or study file; `problems` lists every one of them."""

    def __init__(self, problems: Iterable[str], source: str = "configuration") -> None:
        self.problems = list(problems)
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}{listed}")


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
