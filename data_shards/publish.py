"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtrain.errors import DataError
from mmtrain.files import lock, replaced_folder


@contextmanager
def published(final: Path, goes_on: bool = False) -> Iterator[Path]:
    """A folder beside `final` that takes its name only if the block ends well.

    With `goes_on`, the block finds in it what a killed build left there.
    """
    try:
        with replaced_folder(final, goes_on) as partial:
            yield partial
    except OSError as fault:
        raise DataError(
            f"cannot write '{fault.filename or final}': {fault.strerror};",
            "free space or choose another --out; what was there before is unchanged.",
        ) from fault


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder alone, so that two builds never write into one place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as fault:
        raise DataError(
            f"cannot use '{folder}': {fault.strerror};", "choose another --out."
        ) from fault
    try:
        if not lock(descriptor):
            raise DataError(
                f"another build is writing into '{folder}';",
                "wait for it, or choose another --out.",
            )
        yield
    finally:
        os.close(descriptor)
