"""One place that says how a matrix is cut: some cases always, all others in `make test-all`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def cases(always: Sequence[Any], everything: Sequence[Any]) -> list[Any]:
    """Parameters of a test: those that always run, and the others marked as soaks."""
    others = [one for one in everything if one not in always]
    return [*always, *(_soak(one) for one in others)]


def _soak(one: Any) -> Any:
    values = one if isinstance(one, tuple) else (one,)
    return pytest.param(*values, marks=pytest.mark.soak)
