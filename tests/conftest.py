"""Fixtures shared by all tests; cheap tests first; what CI never skips and others are told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.no_skips import (
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from tests.order import pytest_collection_modifyitems

__all__ = [
    "pytest_collection_modifyitems",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA checkpoint folder."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit shards: train, val, test."""
    return tiny.build_digits(tmp_path_factory.mktemp("digits"))
