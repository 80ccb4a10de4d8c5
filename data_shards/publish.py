"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmtrain.errors import DataError
from mmtrain.files import lock, sync_folder


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its name only if the block ends well.

    A killed build leaves a `.partial` folder that the next build removes; readers never see it.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        _replace(partial, final)
    except OSError as fault:
        raise DataError(
            f"cannot write '{fault.filename or final}': {fault.strerror};",
            "free space or choose another --out; what was there before is unchanged.",
        ) from fault
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; what was there goes only after the new folder is in place."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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
