"""Fixtures shared by all tests, and the rule that CI skips no distributed test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.no_skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA checkpoint folder."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit shards: train, val, test."""
    return tiny.build_digits(tmp_path_factory.mktemp("digits"))
