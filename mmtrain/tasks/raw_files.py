"""Finding raw files where a user said that they lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def json_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds an object. `remedy` says what to do where it is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise DataError(f"'{path}' is not readable ({fault.strerror});", remedy) from fault
    except (ValueError, RecursionError) as fault:
        raise DataError(f"'{path}' is not valid JSON: {fault};", "download it again.") from fault
    if not isinstance(content, dict):
        raise DataError(f"'{path}' holds no JSON object;", "download it again.")
    return content
