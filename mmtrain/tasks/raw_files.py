"""Finding raw files where a user said that they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtrain.errors import DataError


def only_file(raw: Path | None, endings: Sequence[str]) -> Path:
    """The file itself, or the only one of its kind in a folder."""
    assert raw is not None, "needs_raw is True"
    if raw.is_file():
        return raw
    found = sorted(path for path in raw.iterdir() if path.suffix in endings and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"'{raw}' has {len(found)} files that end in {' or '.join(endings)} ({names});",
            "give the file itself as --raw.",
        )
    return found[0]


def needed(raw: Path | None, names: Sequence[str], remedy: str) -> Path:
    """The first of these files that is below the folder."""
    assert raw is not None, "needs_raw is True"
    found = [raw / name for name in names if (raw / name).is_file()]
    if not found:
        raise DataError(f"'{raw}' has no file {' or '.join(names)};", remedy)
    return found[0]
