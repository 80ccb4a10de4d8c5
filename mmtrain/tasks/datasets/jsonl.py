"""A user's own table: a picture's name, a question and an answer per row, by columns.

Raw: a `.jsonl` file with an object per line, or a `.json` file with a list of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks import own_data
from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.own_data import Columns, Row
from mmtrain.tasks.raw_files import only_file


class Jsonl:
    """The task."""

    description = "your own pictures, questions and answers, a row each"
    splits: tuple[str, ...] = own_data.SPLITS
    build_options: type[BaseModel] = Columns
    needs_raw = True
    templates: Mapping[str, Template] = own_data.TEMPLATES
    metrics: tuple[Metric, ...] = own_data.METRICS
    primary_metric = own_data.METRICS[0]

    def read(self, raw: Path | None, split: str, options: Columns) -> Iterator[Sample | Dropped]:
        """The rows of a split in the order of the file."""
        file = only_file(raw, (".jsonl", ".json"))
        folder = options.image_folder or file.parent

        def rows() -> Iterator[Row | Dropped]:
            return own_data.table_rows(read_rows(file), options, folder, file)

        yield from own_data.samples(rows, split, options)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy."""
        return own_data.score(samples, predictions, template)


TASK = Jsonl()
