"""What a killed build had finished, kept in its folder so that the same command goes on.

A line per shard, written when it is on the disk and looked through: a torn last line is one shard
less. The first line says what the build is made from; another build does not go on from it.
"""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from data_shards.look import Looked
from mmtrain.data.examine import in_order
from mmtrain.data.manifest import ShardInfo
from mmtrain.files import file_sha256, replace_file

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Finished:
    """A shard that is done, and where the reader of the raw files stood behind it."""

    looked: Looked
    reader: Mapping[str, Any]


class Journal:
    """The shards of a build that are done."""

    def __init__(self, folder: Path, made_from: Mapping[str, object], threads: int) -> None:
        self._path = folder / JOURNAL_NAME
        found = _read(self._path)
        same = bool(found) and found[0] == json.loads(json.dumps(made_from))
        self.of_another_build = len(found) > 1 and not same
        lines = found[1:] if same else []
        self.finished = list(_intact(folder, lines, threads))
        _clear(folder, {one.looked.info.name for one in self.finished if one.looked.info})
        kept = [made_from, *lines[: len(self.finished)]]
        replace_file(self._path, "".join(_line(one) for one in kept), sync=True)

    def note(self, finished: Finished) -> None:
        """One more shard: on the disk when this returns."""
        info = finished.looked.info
        assert info is not None and not finished.looked.problems
        entry = {
            "shard": info.model_dump(),
            "rows": b64encode(finished.looked.rows).decode(),
            "reader": finished.reader,
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The build is done."""
        self._path.unlink()


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is torn or lost."""
    found = list[dict[str, Any]]()
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                found.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError):
        pass
    return found


def _intact(folder: Path, lines: list[dict[str, Any]], threads: int) -> Iterator[Finished]:
    """The shards before the first that is not what was noted of it."""

    def read(line: Mapping[str, Any]) -> Finished | None:
        try:
            info = ShardInfo.model_validate(line["shard"])
            finished = Finished(Looked(info, b64decode(line["rows"])), dict(line["reader"]))
            return finished if file_sha256(folder / info.name) == info.sha256 else None
        except (OSError, ValueError, TypeError, LookupError):
            return None

    for finished in in_order(read, lines, threads):
        if finished is None:
            return
        yield finished


def _clear(folder: Path, kept: set[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            rmtree(path)
        elif path.name not in kept:
            path.unlink()
