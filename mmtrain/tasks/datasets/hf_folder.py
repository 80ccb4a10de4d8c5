"""A data set in a folder as Hugging Face's `datasets` knows it: parquet files, or pictures.

Raw, one of: `*.parquet` with columns as in `jsonl`, pictures inside; `<label>/<picture>`; pictures
with a `metadata.jsonl` whose rows name them in `file_name`. Files or folders that are called
train, val (validation, dev) or test are these splits; without any, `val` is a share of pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from mmtrain.errors import DataError
from mmtrain.tasks import own_data
from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.own_data import PICTURE_ENDINGS, Columns, Row
from mmtrain.tasks.parquet_rows import parquet_rows

_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_NAMES |= {"test": "test"}
_METADATA = "metadata.jsonl"


class HfOptions(Columns):
    """The columns, and the question where pictures lie in folders of their labels."""

    ask: str = Field(
        "What is in the picture?", description="the question, where folders are the answers"
    )


def _split_of(path: Path, raw: Path) -> str | None:
    """The split that the first folder says, or the name of a file that is no picture."""
    parts = path.relative_to(raw).parts
    is_picture = path.suffix.casefold() in PICTURE_ENDINGS
    for part in dict.fromkeys((*parts[:-1][:1], *(() if is_picture else parts[-1:]))):
        name = part.split("-")[0].split(".")[0].split("_")[0].casefold()
        if name in _NAMES:
            return _NAMES[name]
    return None


def _refuse_files_of_no_split(files: Sequence[Path], raw: Path) -> None:
    """Where some names say their split, files that say none would be lost in silence."""
    unnamed = [path for path in files if _split_of(path, raw) is None]
    if 0 < len(unnamed) < len(files):
        raise DataError(
            f"'{raw}': some files are in train, val or test, {len(unnamed)} are in none, as"
            f" {unnamed[0].relative_to(raw)};",
            "put them into one, or take that name from all.",
        )


def _files(raw: Path) -> list[Path]:
    """Parquet files, else lists of pictures, else pictures."""
    kinds = ("**/*.parquet", f"**/{_METADATA}", "**/*")
    for kind in kinds:
        found = sorted(path for path in raw.glob(kind) if path.is_file())
        if kind == kinds[-1]:
            found = [path for path in found if path.suffix.casefold() in PICTURE_ENDINGS]
        if found:
            return found
    raise DataError(
        f"'{raw}' holds neither parquet files nor pictures;", "give the data set's folder as --raw."
    )


def _rows(
    files: Sequence[Path], raw: Path, options: HfOptions, labels: tuple[str, ...]
) -> Iterator[Row | Dropped]:
    elsewhere = options.image_folder
    if files and files[0].suffix == ".parquet":
        for file in files:
            yield from own_data.table_rows(parquet_rows(file), options, elsewhere or raw, file)
    elif files and files[0].name == _METADATA:
        columns = options.model_copy(update={"image": "file_name"})
        for file in files:
            place = elsewhere or file.parent
            yield from own_data.table_rows(read_rows(file), columns, place, file)
    else:
        for path in files:
            name = path.relative_to(raw).as_posix()
            if path.parent == raw or path.parent.name.casefold() in _NAMES:
                raise DataError(
                    f"'{raw}': no folder says what is in {name};",
                    "put pictures into a folder for each label, or give a metadata.jsonl.",
                )
            yield Row(name, (path,), options.ask, (path.parent.name,), labels)


class HfFolder:
    """The task."""

    description = "a folder of Hugging Face's datasets: parquet, pictures by label, or metadata"
    splits: tuple[str, ...] = ("train", "val", "test")
    build_options: type[BaseModel] = HfOptions
    needs_raw = True
    templates: Mapping[str, Template] = own_data.TEMPLATES
    metrics: tuple[Metric, ...] = own_data.METRICS
    primary_metric = own_data.METRICS[0]

    def read(self, raw: Path | None, split: str, options: HfOptions) -> Iterator[Sample | Dropped]:
        """The rows of a split, files in the order of their names."""
        assert raw is not None, "needs_raw is True"
        files, own, part = _files(raw), options, split
        labels = tuple(sorted({path.parent.name for path in files}))
        _refuse_files_of_no_split(files, raw)
        if any(_split_of(path, raw) for path in files):
            # The names say what is in a split: all of it.
            files = [path for path in files if _split_of(path, raw) == split]
            own, part = options.model_copy(update={"val": 0.0}), "train"
        yield from own_data.samples(lambda: _rows(files, raw, options, labels), part, own)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy."""
        return own_data.score(samples, predictions, template)


TASK = HfFolder()
