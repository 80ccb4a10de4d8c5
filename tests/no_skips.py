"""With CI=true a distributed or end-to-end test may fail, but never be skipped.

Elsewhere the run's last lines say what was left out, for want of what, and how to get it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import PurePath
from typing import Any

import pytest

NEVER_SKIPPED_IN_CI = frozenset({"distributed", "end_to_end"})


def _file(node_id: str) -> str:
    return node_id.split("::")[0]


def _matters(node_id: str) -> bool:
    return not NEVER_SKIPPED_IN_CI.isdisjoint(PurePath(_file(node_id)).parts)


def _reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def _forbid_skip(report: Any) -> None:
    """Turn a skip, whatever its reason, into a failure that repeats the reason."""
    in_ci = os.environ.get("CI", "").lower() in {"1", "true"}
    if in_ci and report.skipped and not hasattr(report, "wasxfail") and _matters(report.nodeid):
        reason = _reason(report)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} may not be skipped in CI ({reason})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Skips of one test: marks, fixtures, pytest.skip()."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Skips of a whole module: pytest.importorskip() at its top."""
    report = yield
    _forbid_skip(report)
    return report


def left_out(reports: Iterable[Any]) -> str:
    """What was skipped that CI would run, in one line; empty when nothing was."""
    counts = Counter(
        (_reason(report), _file(report.nodeid)) for report in reports if _matters(report.nodeid)
    )
    parts = [f"{number} of {file}, {reason}" for (reason, file), number in counts.items()]
    return f"NOT RUN HERE: {'; '.join(parts)}" if parts else ""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None, None, None]:
    """The last word before the closing line."""
    yield
    if line := left_out(terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line)
