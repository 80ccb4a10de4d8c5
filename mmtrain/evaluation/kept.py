"""Answers kept chunk by chunk: an evaluation that was killed goes on where it stopped."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtrain import distributed
from mmtrain.evaluation.answer import Answers
from mmtrain.files import replace_file

log = logging.getLogger("mmtrain")


@dataclass
class KeptAnswers:
    """Those of one rank, in a file; `known` are of the first chunks, as many on every rank."""

    path: Path
    known: list[Answers]

    @classmethod
    def open(cls, folder: Path, identity: str, rank: int) -> KeptAnswers:
        """What an earlier attempt at the very same left; its file's first line tells the same."""
        path = folder / f"rank-{rank}.jsonl"
        found = _read(path, identity)
        found = found[: min(distributed.gather_objects(len(found)))]
        if found and distributed.is_main():
            log.info("going on after %d chunks that were answered before", len(found))
        kept = cls(path, found)
        kept._write("".join([identity, *map(_line, found)]))
        return kept

    def add(self, answers: Answers) -> None:
        """One more chunk."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(answers))
        except OSError as fault:
            _not_kept(fault)

    def remove(self) -> None:
        """What was asked is answered and written elsewhere."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks remove theirs
            self.path.parent.rmdir()

    def _write(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, text)
        except OSError as fault:
            _not_kept(fault)


def _not_kept(fault: OSError) -> None:
    """No reason to stop: the answers are in memory, too."""
    log.warning("answers are not kept while they come (%s: %s)", fault.filename, fault.strerror)


def _line(answers: Answers) -> str:
    return "\n" + json.dumps(asdict(answers))


def _read(path: Path, identity: str) -> list[Answers]:
    """Whole lines in their order, up to the first that is none."""
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return []
    found: list[Answers] = []
    for line in lines if first == identity else ():
        try:
            found.append(Answers(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return found
