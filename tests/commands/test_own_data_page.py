"""docs/own-data.md: its commands one after the other, as its reader types them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from mmtrain.data.shards import ShardFolder
from tests import tiny

PAGE = tiny.REPOSITORY / "docs" / "own-data.md"
NUM_PHOTOS = 30
PARTS = ("bearing", "gasket", "bolt")
# A checkpoint of 7B parameters is not at hand; a tiny one has other needs than a GPU.
STANDS_FOR = "/data/llava-1.5-7b-hf"
RUN_ALL = """
import json, sys
from mmtrain.__main__ import main
for words in json.load(sys.stdin):
    if main(words):
        sys.exit(f"failed: {words}")
"""
ON_A_CPU = ["model.dtype=fp32", "optim.epochs=1", "components.llm.r=8", "tracking.uri=none"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty photos of parts, drawn, and a row for each."""
    (tmp_path / "photos").mkdir()
    rows = []
    for number in range(NUM_PHOTOS):
        kind = number % len(PARTS)
        photo = Image.new("RGB", (64, 48), (200, 200 - number, 180))
        draw = ImageDraw.Draw(photo)
        (draw.ellipse, draw.rectangle, draw.line)[kind]((10, 8, 40 + number % 9, 40), fill="navy")
        name = f"photos/{number:04d}.jpg"
        photo.save(tmp_path / name)
        answer = PARTS[kind]
        rows.append({"image": name, "question": "Which part is this?", "answer": answer})
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "parts.jsonl").write_text(lines)
    return tmp_path


def fenced(language: str) -> list[str]:
    """The page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)


def commands() -> list[str]:
    """Of the page's shell blocks."""
    lines = (line for block in fenced("console") for line in block.splitlines())
    return [line[2:] for line in lines if line.startswith("$ ")]


def in_processes(listed: list[str]) -> list[list[str]]:
    """What comes before a process group, and each that has one, in a process: imports are dear."""
    parts: list[list[str]] = [[]]
    for command in listed:
        parts[-1].append(command)
        if command.split()[1] in ("train", "evaluate", "predict"):
            parts.append([])
    return [part for part in parts if part]


def test_its_commands_run_one_after_the_other(folder: Path, tiny_checkpoint: Path) -> None:
    said = ""
    for part in in_processes(commands()):
        typed = [shlex.split(one.replace(STANDS_FOR, str(tiny_checkpoint))) for one in part]
        assert all(words[0] == "mmtrain" for words in typed)
        lines = [
            [*words[1:], *(ON_A_CPU if words[1] in ("check", "train") else [])] for words in typed
        ]
        ran = subprocess.run(
            [sys.executable, "-c", RUN_ALL],
            input=json.dumps(lines),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, f"{part}\n{ran.stdout}{ran.stderr}"
        said += ran.stdout
    assert "30 rows; columns: image: image, question: question, answer: answer" in said
    assert "next: mmtrain shards build jsonl --raw parts.jsonl --out shards/parts" in said
    sizes = [len(ShardFolder.open(folder / "shards" / "parts" / one)) for one in ("train", "val")]
    assert sum(sizes) == NUM_PHOTOS and sizes[1] > 0
    found = yaml.safe_load((folder / "parts.yaml").read_text())
    assert found["optim"]["global_batch"] == 2 and found["optim"]["epochs"] == 7
    page = (folder / "parts.html").read_text()
    assert page.count("data:image/jpeg") == min(24, sizes[0])
    assert "Which part is this?" in page and "bearing" in page and " tokens, loss on " in page
    assert (folder / "runs" / "llava-lora-jsonl" / "adapter").is_dir()


def test_its_yaml_is_valid() -> None:
    from mmtrain.resolve import resolve

    for block in fenced("yaml"):
        run = yaml.safe_load(block)
        if "mix" not in run["data"]:
            run["data"] |= {"task": "jsonl", "train": "shards/parts/train"}
        assert resolve({**run, "model": {"family": "llava", "preset": "tiny"}}).data
