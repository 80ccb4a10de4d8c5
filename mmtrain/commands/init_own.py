"""What `mmtrain init --raw` reads from a user's own data: columns, sizes, the way to shards."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.errors import MmtrainError
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.own_data import names_a_picture
from mmtrain.tasks.raw_files import only_file

_LOOKED_AT = 1000
_QUESTIONS = ("question", "prompt", "instruction", "query", "input", "text", "problem")
_ANSWERS = ("answer", "answers", "label", "caption", "response", "output", "target", "solution")
_CHOICES = ("choices", "options", "candidates")
_IDS = ("id", "question_id", "qid", "name", "key")
_MOST_SAMPLES_PER_STEP, _FEWEST_STEPS = 128, 100
# A rough token, to bound answers; what is cut in training is said there.
_CHARACTERS_PER_TOKEN, _SPARE_TOKENS = 3, 8


@dataclass(frozen=True)
class OwnFacts:
    """What fills a run file, and the command that builds its shards."""

    rows: int
    shards: str
    build: str
    epochs: int
    global_batch: int
    answer_tokens: int
    columns: Mapping[str, str] = field(default_factory=dict)  # ours -> the file's


def look_at(task: str, raw: Path, images: str | None) -> OwnFacts:
    """Read the first rows, count the others."""
    if task not in ("jsonl", "llava_json"):
        raise MmtrainError(f"--raw tells nothing of '{task}';", "give it with jsonl or llava_json.")
    file = only_file(raw, (".jsonl", ".json"))
    first: list[Mapping[str, Any]] = []
    rows = 0
    for place, record in read_rows(file):
        rows += 1
        if len(first) < _LOOKED_AT:
            if not isinstance(record, Mapping):
                raise MmtrainError(f"'{file}': {place} is no object;", "give one per row.")
            first.append(record)
    if not first:
        raise MmtrainError(f"'{file}' has no rows;", "fill it first.")
    columns = _columns(first, file) if task == "jsonl" else {}
    batch = _power_of_two_below(rows // 8, _MOST_SAMPLES_PER_STEP)
    epochs = min(30, max(3, -(-_FEWEST_STEPS * batch // rows)))
    shards = f"shards/{file.stem}"
    build = _build_command(task, raw, images, shards, columns)
    answer = max(_longest_answer(record, columns) for record in first)
    tokens = answer // _CHARACTERS_PER_TOKEN + _SPARE_TOKENS
    return OwnFacts(rows, shards, build, epochs, batch, tokens, columns)


def _power_of_two_below(number: int, most: int) -> int:
    return min(most, 1 << max(0, number.bit_length() - 1))


def _columns(records: Sequence[Mapping[str, Any]], file: Path) -> dict[str, str]:
    """Ours -> theirs, by name and by what is in them."""
    named = dict.fromkeys(str(name) for record in records for name in record)
    names = [name for name in named if name.isprintable()]  # they go into a file, as one line
    found = {
        "image": next((name for name in names if _names_pictures(records, name)), None),
        "question": _named(names, _QUESTIONS),
        "answer": _named(names, _ANSWERS),
        "choices": _named(names, _CHOICES),
        "id": _named(names, _IDS),
    }
    missing = [ours for ours in ("question", "answer") if found[ours] is None]
    if missing:
        raise MmtrainError(
            f"'{file}': which column is the {' and which the '.join(missing)}? It has"
            f" {', '.join(names)};",
            f"rename it; or leave --raw out here, and build with --set {missing[0]}=COLUMN.",
        )
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _named(names: Sequence[str], usual: Sequence[str]) -> str | None:
    by_lower = {name.casefold(): name for name in reversed(names)}
    return next((by_lower[one] for one in usual if one in by_lower), None)


def _names_pictures(records: Sequence[Mapping[str, Any]], column: str) -> bool:
    given = [record[column] for record in records if record.get(column)]
    return bool(given) and all(names_a_picture(one) for one in given)


def _build_command(
    task: str, raw: Path, images: str | None, shards: str, columns: Mapping[str, str]
) -> str:
    parts = ["mmtrain", "shards", "build", task, "--raw", str(raw), "--out", shards]
    parts += ["--images", images] if images else []
    for ours, theirs in columns.items():
        parts += ["--set", f"{ours}={theirs}"] if ours != theirs else []
    return shlex.join(parts)


def _longest_answer(record: Mapping[str, Any], columns: Mapping[str, str]) -> int:
    value = record.get(columns.get("answer", ""))
    turns = record.get("conversations")
    if not columns and isinstance(turns, list):
        value = [one.get("value") for one in turns if isinstance(one, Mapping)][1::2]
    texts = value if isinstance(value, list) else [value]
    return max((len(str(one)) for one in texts), default=0)
