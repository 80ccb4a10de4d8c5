"""With CI=true a distributed or end-to-end test may fail, but never be skipped."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import PurePath
from typing import Any

import pytest

NEVER_SKIPPED_IN_CI = frozenset({"distributed", "end_to_end"})


def _must_run(node_id: str) -> bool:
    in_ci = os.environ.get("CI", "").lower() in {"1", "true"}
    return in_ci and not NEVER_SKIPPED_IN_CI.isdisjoint(PurePath(node_id.split("::")[0]).parts)


def _forbid_skip(report: Any) -> None:
    """Turn a skip, whatever its reason, into a failure that repeats the reason."""
    if not report.skipped or hasattr(report, "wasxfail") or not _must_run(report.nodeid):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
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
