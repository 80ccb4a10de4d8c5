"""How hard to fuzz: a little in `make test`, MMTRAIN_FUZZ times as much in `make test-all`."""

from __future__ import annotations

import os


def examples(number: int) -> int:
    """Examples to try."""
    return number * int(os.environ.get("MMTRAIN_FUZZ", "1"))
