"""Damaged downloads, of every task: a clear error, a named row, or the right sample."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mmtrain import plugins
from mmtrain.errors import MmtrainError
from mmtrain.tasks.interface import Dropped, Sample, Task
from tests.fuzz import examples

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"
WITH_FILES = [name for name in plugins.names("task") if plugins.load("task", name).needs_raw]
_VALUES = [None, 3, -1, 1.5, True, "", "x", [], [3], {}, {"a": 1}, "\ud800", "../x"]


def _cut(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data) + 1)]


def _flipped(data: bytes, draws: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(1 + draws.randrange(4)):
        if changed:
            changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def _retyped(data: bytes, draws: random.Random) -> bytes:
    """One value of the JSON, or of one of its lines, becomes another, or goes."""
    try:
        content = json.loads(data)
    except ValueError:
        return _one_line_retyped(data, draws)
    return json.dumps(_with_one_changed(content, draws)).encode()


def _one_line_retyped(data: bytes, draws: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draws.randrange(len(lines))
    try:
        lines[at] = json.dumps(_with_one_changed(json.loads(lines[at]), draws)).encode()
    except ValueError:
        lines[at] = bytes(draws.randrange(256) for _ in range(draws.randrange(9)))
    return b"\n".join(lines)


def _with_one_changed(content: object, draws: random.Random) -> object:
    places = list(_places(content))
    if not places or draws.randrange(20) == 0:
        return draws.choice(_VALUES)
    holder, key = draws.choice(places)
    if draws.randrange(3):
        holder[key] = draws.choice(_VALUES)  # type: ignore[index]
    else:
        del holder[key]  # type: ignore[attr-defined]
    return content


def _places(content: object) -> Iterator[tuple[object, object]]:
    """Every holder and key."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "flipped": _flipped,
    "retyped": _retyped,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", WITH_FILES)
def test_damaged_files_end_in_plain_words(name: str, damage: str, tmp_path: Path) -> None:
    task: Task = plugins.load("task", name)
    raw = Path(shutil.copytree(GOLDEN / name / "raw", tmp_path / "raw"))
    # Files of text are what readers take apart; pictures are looked at when shards are built.
    files = sorted(path for path in raw.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix not in (".png", ".jpg")] or files
    draws, healthy = random.Random(f"{name} {damage}"), _read(task, raw)
    for number in range(examples(15)):
        file = draws.choice(texts if number % 5 else files)
        whole = file.read_bytes()
        file.write_bytes(DAMAGE[damage](whole, draws))
        try:
            found = _read(task, raw)
        except (MmtrainError, OSError):
            pass  # said in plain words, an OSError by `shards build`
        except Exception as fault:
            raise AssertionError(f"{file.name}, damage {number}") from fault
        else:
            assert all(one.reason for one in found if isinstance(one, Dropped))
            # A file that ends with a line is a shorter file; other values may be other rows.
            if damage != "retyped" and not _ends_with_a_line(whole, file.read_bytes()):
                assert _accounts_for(healthy, found), f"{file.name}, damage {number}: silent loss"
        file.write_bytes(whole)


def _read(task: Task, raw: Path) -> list[Sample | Dropped]:
    options = task.build_options()
    return [one for split in task.splits for one in task.read(raw, split, options)]


def _ends_with_a_line(whole: bytes, damaged: bytes) -> bool:
    following = whole[len(damaged) :].lstrip(b"\r")[:1]
    cut_between = following in (b"\n", b"") or damaged[-1:] in (b"\n", b"")
    return cut_between and whole.startswith(damaged)


def _accounts_for(healthy: Sequence[Sample | Dropped], found: Sequence[Sample | Dropped]) -> bool:
    """As many entries as before, or one more that says why it is no sample."""
    lost = Counter(one for one in healthy if isinstance(one, Dropped))
    named = Counter(one for one in found if isinstance(one, Dropped)) - lost
    return len(found) >= len(healthy) or bool(named)
