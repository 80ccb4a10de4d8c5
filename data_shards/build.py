"""One split of a task, from raw files to a shard folder."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_shards.index import Inventory, write_manifest
from data_shards.journal import Finished, Journal
from data_shards.look import Looked
from data_shards.lookers import Lookers
from data_shards.publish import published
from data_shards.reading import LeftOut, Recipe, num_expected, samples
from data_shards.writer import ShardWriter, refuse_empty, refuse_unsound
from mmtrain import plugins
from mmtrain.data.manifest import MANIFEST_NAME, Manifest
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.files import replace_file

# Beside the manifest, not in it: the manifest is the same wherever the raw files lie.
SOURCE_NAME = "source.json"
OnSamples = Callable[[int, int, int], None]  # samples written, looked at, and expected in all


@dataclass(frozen=True)
class Built:
    """A finished folder; `reused` if an identical one was there already."""

    folder: Path
    manifest: Manifest
    reused: bool
    left_out: Sequence[str]  # a line for each reason


def build_split(
    recipe: Recipe,
    folder: Path,
    overwrite: bool = False,
    progress: OnSamples | None = None,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> Built:
    """Write the shards of one split to `folder`, or keep an identical finished folder there.

    What a killed build of the same recipe had finished is kept. The bytes are the same for any
    number of `workers`.
    """
    source = _source(recipe, folder)
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
    with published(folder, goes_on=True) as partial:
        journal = Journal(partial, _made_from(recipe, source), workers)
        if journal.of_another_build:
            say(f"{folder}: begins anew: what was killed here had other files, options or versions")
        if journal.finished:
            say(f"{folder}: goes on behind {len(journal.finished)} finished shard(s)")
        build = _Build(recipe, partial, journal, workers)
        manifest = build.write(progress)
        lines = build.left_out.lines()
        about = {**source, "left_out": lines}
        replace_file(partial / SOURCE_NAME, json.dumps(about, indent=2), sync=True)
        journal.remove()
    return Built(folder, manifest, False, lines)


class _Build:
    """A folder being written: full shards are looked through while the next ones are filled."""

    def __init__(self, recipe: Recipe, folder: Path, journal: Journal, workers: int) -> None:
        self._recipe, self._folder, self._journal = recipe, folder, journal
        self._workers = workers
        self._looked = [one.looked for one in journal.finished]
        self._num_looked_at = sum(one.info.samples for one in self._looked if one.info)
        self._states: deque[Mapping[str, Any]] = deque()  # behind shards that are looked through
        self.left_out = LeftOut.at(journal.finished[-1].reader) if journal.finished else LeftOut()

    def write(self, progress: OnSamples | None) -> Manifest:
        """All shards, then the manifest that pins them; nothing of it where a sample is unsound."""
        recipe, first = self._recipe, len(self._looked)
        drawn_by_number = recipe.limit is not None and not recipe.droppable
        expected = num_expected(recipe) if progress or drawn_by_number else None

        with (
            Lookers(recipe.task, self._workers, first) as lookers,
            ShardWriter(self._folder, recipe.samples_per_shard, first) as writer,
        ):

            def tell(looked_at: int) -> None:
                if progress is not None and expected is not None:
                    progress(writer.samples, looked_at, min(expected, recipe.limit or expected))

            for sample, state in samples(recipe, self.left_out, self._workers, expected):
                full = writer.add(sample)
                if full is not None and state is not None:
                    lookers.begin(full)
                    self._states.append(state)
                self._take(lookers.finished())
                tell(self._num_looked_at)
            self.left_out.refuse_more_than(recipe.droppable)
            refuse_empty(writer.samples, recipe.task, recipe.split)
            last = writer.close()
            if last is not None:
                num_last, num_bytes = writer.samples % recipe.samples_per_shard, last.stat().st_size
                before = self._num_looked_at
                lookers.look(last, lambda end: tell(before + num_last * end // num_bytes))
            for one in lookers.finished(wait=True):
                self._take([one])
                tell(self._num_looked_at)
        return self._pinned(writer.samples)

    def _take(self, looked: Iterable[Looked]) -> None:
        """Shards that were looked through, in their order: sound ones need never be built again."""
        for one in looked:
            self._looked.append(one)
            self._num_looked_at += one.info.samples if one.info else 0
            state = self._states.popleft() if self._states else None
            if state is not None and not any(earlier.problems for earlier in self._looked):
                self._journal.note(Finished(one, state))

    def _pinned(self, num_samples: int) -> Manifest:
        inventory = Inventory.of(self._folder, self._looked)
        refuse_unsound(inventory, self._folder, num_samples)
        recipe = self._recipe
        return write_manifest(
            self._folder,
            inventory,
            recipe.task,
            recipe.split,
            recipe.seed,
            recipe.limit,
            recipe.build_options,
        )


def _made_from(recipe: Recipe, source: Mapping[str, object]) -> dict[str, object]:
    """All that decides the bytes: what was built from something else is no beginning of it."""
    packages = (Path(__file__).parent, Path(plugins.__file__).parent / "data")
    code = sha256(b"".join(path.read_bytes() for place in packages for path in _modules(place)))
    return {
        **source,
        "task": recipe.task,
        "split": recipe.split,
        "seed": recipe.seed,
        "limit": recipe.limit,
        "build_options": recipe.build_options,
        "code": code.hexdigest(),
        "versions": [version(name) for name in ("pillow", "webdataset")],
    }


def _modules(place: Path) -> list[Path]:
    return sorted(place.glob("*.py"))


def _source(recipe: Recipe, folder: Path) -> dict[str, str | int | float]:
    """What the folder was made from: raw files by name, size and time, and the reader's code."""
    listing = sha256()
    # What is built beside the raw files is none of them, and a killed build finds it changed.
    beside = (f".{folder.name}.partial", f".{folder.name}.replaced", folder.name)
    built = {os.path.abspath(folder.parent / name) for name in (*beside, "")}
    raw, pictures = recipe.raw, getattr(recipe.options, "image_folder", None)
    if raw is not None and raw.is_file() and pictures is None:
        pictures = raw.parent  # where the names in it start from
    for place in filter(None, (raw, pictures)):
        for name in _files_below(place, built) if place.is_dir() else ["."]:
            stat = (place / name).stat()
            listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    tasks = Path(plugins.__file__).parent / "tasks"
    readers = (*_modules(tasks), tasks / "datasets" / f"{recipe.task}.py")
    return {
        "raw_files": listing.hexdigest(),
        "reader": sha256(b"".join(path.read_bytes() for path in readers)).hexdigest(),
        "samples_per_shard": recipe.samples_per_shard,
        "droppable": recipe.droppable,
    }


def _files_below(folder: str | Path, but: Set[str], prefix: str = "") -> Iterator[str]:
    """Names of all files, folder by folder: there may be millions, which no list should hold."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except PermissionError:
        return  # `lost+found` of a disk, say
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            if os.path.abspath(path) not in but:
                yield from _files_below(path, but, f"{prefix}{name}/")
        elif os.path.isfile(path):
            yield prefix + name


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
        and manifest.build_options == recipe.build_options
    )
    return (manifest, left_out) if same else None
