"""Rows of a parquet file, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.errors import DataError

_ROWS_AT_ONCE = 64


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(its place, column -> value) of every row."""
    # Imported here: listing tasks must be instant.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.stem}-{number}", record
            # Where a page is damaged, its library may end early without a word.
            if number != file.metadata.num_rows:
                raise ArrowException(f"{number} of {file.metadata.num_rows} rows can be read")
    except (ArrowException, UnicodeDecodeError) as fault:
        raise DataError(
            f"'{path}' is no intact parquet file: {fault};", "copy it again."
        ) from fault
