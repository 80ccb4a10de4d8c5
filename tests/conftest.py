"""Fixtures shared by all tests; cheap tests first; what CI never skips and others are told of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import tiny
from tests.no_skips import (
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.order import pytest_collection_modifyitems, pytest_xdist_make_scheduler

__all__ = [
    "pytest_collection_modifyitems",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
    "pytest_xdist_make_scheduler",
]

# A second thread gains nothing on tiny models, and waits for its turn where a machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA checkpoint folder."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit shards: train, val, test."""
    return tiny.build_digits(tmp_path_factory.mktemp("digits"))
