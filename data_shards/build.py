"""One split of a task, from raw files to a shard folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from data_shards.publish import published
from data_shards.writer import DEFAULT_SAMPLES_PER_SHARD, ShardWriter
from mmtrain import plugins
from mmtrain.data.examine import look_at
from mmtrain.data.manifest import MANIFEST_NAME, Manifest
from mmtrain.data.order import epoch_order
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.files import replace_file
from mmtrain.tasks.interface import Dropped, Sample, Task

# Beside the manifest, not in it: the manifest is the same wherever the raw files lie.
SOURCE_NAME = "source.json"
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Recipe:
    """All that decides what a shard folder holds."""

    task: str
    split: str
    raw: Path | None
    options: BaseModel
    seed: int = 0
    limit: int | None = None
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    droppable: float = 0.0  # the share of raw samples that may be left out


@dataclass(frozen=True)
class Built:
    """A finished folder; `reused` if an identical one was there already."""

    folder: Path
    manifest: Manifest
    reused: bool
    left_out: Sequence[str]  # a line for each reason


@dataclass
class LeftOut:
    """Raw samples that are none here: how many for each reason, and the first by name."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    read: int = 0

    def add(self, dropped: Dropped) -> None:
        """One more."""
        self.counts[dropped.reason] += 1
        names = self.named.setdefault(dropped.reason, [])
        if len(names) < _NAMED_AT_MOST:
            names.append(f"{dropped.id} ({dropped.detail})" if dropped.detail else dropped.id)

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count} of {self.read}: {reason} {', '.join(self.named[reason])}"
            + ", …" * (count > len(self.named[reason]))
            for reason, count in self.counts.most_common()
        ]

    def refuse_more_than(self, share: float) -> None:
        """An error that lists them all, where they are more than allowed."""
        if self.counts.total() > share * self.read:
            raise DataError(
                f"{self.counts.total()} of {self.read} raw samples cannot be built:",
                "; ".join(self.lines()) + ". Correct them, or allow a share: --drop 5%.",
            )


def build_split(
    recipe: Recipe,
    folder: Path,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Built:
    """Write the shards of one split to `folder`, or keep an identical finished folder there."""
    source, left_out = _source(recipe), LeftOut()
    if folder.exists():
        kept = _identical(recipe, folder, source)
        if kept is not None:
            manifest, lines = kept
            return Built(folder, manifest, True, lines)
        if not overwrite:
            raise DataError(
                f"'{folder}' exists and was built from other files or options, or by another"
                " version of mmtrain;",
                "choose another --out, or pass --overwrite to replace it.",
            )
    with published(folder) as partial:
        writer = ShardWriter(partial, recipe.samples_per_shard)
        for count, sample in enumerate(_samples(recipe, left_out), start=1):
            writer.add(sample)
            if progress is not None:
                progress(count)
        left_out.refuse_more_than(recipe.droppable)
        manifest = writer.finish(
            recipe.task,
            recipe.split,
            recipe.seed,
            recipe.limit,
            recipe.options.model_dump(mode="json"),
        )
        about = {**source, "left_out": left_out.lines()}
        replace_file(partial / SOURCE_NAME, json.dumps(about, indent=2), sync=True)
    return Built(folder, manifest, False, left_out.lines())


def _samples(recipe: Recipe, left_out: LeftOut) -> Iterator[Sample]:
    """The samples of a split; with `limit`, a keyed draw in the order of the split."""
    if recipe.limit is None:
        yield from _read(recipe, left_out)
        return
    # Counting first costs a second reading, but never holds more than one sample.
    num_samples = sum(1 for _ in _read(recipe, LeftOut()))
    drawn = epoch_order(num_samples, recipe.seed, epoch=0)[: recipe.limit]
    keep = np.zeros(num_samples, dtype=bool)
    keep[drawn] = True
    for index, sample in enumerate(_read(recipe, left_out)):
        if keep[index]:
            yield sample


def _read(recipe: Recipe, left_out: LeftOut) -> Iterator[Sample]:
    task: Task = plugins.load("task", recipe.task)
    try:
        for found in task.read(recipe.raw, recipe.split, recipe.options):
            left_out.read += 1
            checked = _usable(found, task) if recipe.droppable else found
            if isinstance(checked, Sample):
                yield checked
            else:
                left_out.add(checked)
    except OSError as fault:
        raise DataError(
            f"cannot read '{fault.filename}' of task '{recipe.task}': {fault.strerror};",
            "check the folder given with --raw.",
        ) from fault


def _usable(found: Sample | Dropped, task: Task) -> Sample | Dropped:
    """Looked at before it is written: otherwise all of a folder is looked at behind the last."""
    try:
        if isinstance(found, Sample):
            look_at(found, task)
    except DataError as fault:
        _, _, why = fault.fault.partition(": ")  # without the sample's own name
        return Dropped(found.id, "training would refuse it.", why or fault.fault)
    return found


def _source(recipe: Recipe) -> dict[str, str | int | float]:
    """What the folder was made from: raw files by name, size and time, and the reader's code."""
    listing = sha256()
    raw, pictures = recipe.raw, getattr(recipe.options, "image_folder", None)
    if raw is not None and raw.is_file() and pictures is None:
        pictures = raw.parent  # where the names in it start from
    for place in filter(None, (raw, pictures)):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                stat = path.stat()
                name = path.relative_to(place).as_posix()
                listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    tasks = Path(plugins.__file__).parent / "tasks"
    readers = (*sorted(tasks.glob("*.py")), tasks / "datasets" / f"{recipe.task}.py")
    return {
        "raw_files": listing.hexdigest(),
        "reader": sha256(b"".join(path.read_bytes() for path in readers)).hexdigest(),
        "samples_per_shard": recipe.samples_per_shard,
        "droppable": recipe.droppable,
    }


def _identical(
    recipe: Recipe, folder: Path, source: Mapping[str, object]
) -> tuple[Manifest, list[str]] | None:
    """The manifest of a finished folder if this recipe would write the same; what it left out."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        found = dict(json.loads((folder / SOURCE_NAME).read_bytes()))
        left_out = [str(line) for line in found.pop("left_out", [])]
        manifest = ShardFolder.open(folder).manifest
    except (OSError, ValueError, TypeError, DataError):
        return None  # damaged or not ours: never kept, and replaced only when asked for
    same = (
        found == source
        and manifest.task == recipe.task
        and manifest.split == recipe.split
        and manifest.seed == recipe.seed
        and manifest.limit == recipe.limit
        and manifest.build_options == recipe.options.model_dump(mode="json")
    )
    return (manifest, left_out) if same else None
