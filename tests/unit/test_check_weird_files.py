"""`mmtrain check` of run files that nobody should write: one or more plain lines, no traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmtrain.__main__ import main
from mmtrain.errors import ConfigError
from mmtrain.resolve import resolve
from mmtrain.safe_text import MAX_LINE_CHARS
from tests.fuzz import examples

RUN: dict[str, Any] = {
    "name": "x",
    "model": {"family": "llava", "preset": "tiny", "overrides": {"llm": {"layers": 2}}},
    "components": {"llm": {"mode": "peft", "method": "lora", "layers": "last-2", "r": 4}},
    "data": {"task": "digits", "train": "a", "val": "b"},
    "optim": {"betas": [0.9, 0.99], "global_batch": 8, "micro_batch": 2},
    "validate": {"every": "epoch", "metric": "loss"},
    "generation": {"num_beams": 1},
    "parallel": {"deepspeed": "zero1"},
    "tracking": {"uri": "none", "tags": {"a": "b"}},
}
# As YAML: what JSON cannot say is here, too.
VALUES = (
    "~ true 0 -1 1.5 -0.0 1e-320 1e999 .inf -.inf .nan 100000000000000000 '' ' ' '²' '/' '.' '..'"
    " [] {} [[]] [~] [1,2,3] [-1] {'':''} {a:{b:{c:1}}} !!int&x '[/red]' '%s{}' auto first-0"
    " first-99999999999999999999 http://user:hunter2@host '@' `x` é😀漢 '~' *a &a << ! {a:1,a:2}"
).split()
VALUES += [r'"\0"', r'"\ud800"', r'"\e[31m"', r'"\n\n"', "9" * 5000, "[" * 400, "x" * 9000]
FILES = [
    *(b"", b"[]", b"- a", b"3", b"null", b"\xff\xfe", b"\x80abc", b"\0", b"\t", b"\r\r\n", b"'"),
    *(
        b"a: 1\n---\nb: 2",
        b"model: 1\nmodel: 2",
        b"? [a]\n: 1",
        b"{}: 1",
        b"true: 1",
        b"*a",
        b"|\n",
    ),
    *(b"<<: [3]", b"%" * 999, b"{" * 5000, b"&" * 99, "𝒳: 1".encode(), bytes(range(256))),
    *(json.dumps(RUN).encode("utf-16"), b"".join(b"k%d: 1\n" % n for n in range(300))),
]


def places(value: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place in a run file that holds something."""
    inside = value.items() if isinstance(value, dict) else ()
    return [*([place] if place else []), *(p for k, v in inside for p in places(v, (*place, k)))]


def assert_plain_lines(told: str) -> None:
    """What a terminal may show."""
    lines = told.splitlines()
    assert lines and lines[0].startswith("error: ") and len(lines) < 110
    assert all(line.isprintable() and len(line) < MAX_LINE_CHARS + 100 for line in lines)
    assert "hunter2" not in told


@pytest.mark.parametrize("content", FILES, ids=lambda content: repr(content[:12]))
def test_a_weird_file(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert main(["check", str(file)]) == 2
    assert_plain_lines(capsys.readouterr().err)


def test_weird_values_everywhere() -> None:
    """In process and without a model: what is accepted here is counted by other tests."""
    chosen = random.Random(7)
    pairs = [(place, value) for place in places(RUN) for value in VALUES]
    refused = 0
    for place, value in chosen.sample(pairs, min(len(pairs), examples(300))):
        override = f"{'.'.join(place)}={value}"
        try:
            resolve(RUN, [override], world_size=2)
        except ConfigError as error:
            refused += 1
            assert_plain_lines(f"error: {error}")
        except Exception as error:
            raise AssertionError(f"{override[:100]!r} ends in a traceback") from error
    assert refused > 200
