"""The benchmark runs, compares like with like, and keeps what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soaks import cases
from tests.tiny import AVX2, REPOSITORY

# Beside TRL's defaults is the same program as beside TRL without recomputation, and `families` is
# that of `training`, with other models.
QUICK = ["training", "trl-tuned", "profile"]
SECTIONS = ["tests", *QUICK, "families"]


@pytest.mark.parametrize("sections", cases([QUICK], [QUICK, SECTIONS]), ids=len)
def test_everything_for_a_card_on_the_cpu(tmp_path: Path, sections: list[str]) -> None:
    """`make gpu` on tiny models, so that it works on the day a card comes."""
    log = tmp_path / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--budget", "1500"]
        command += ["--only", *sections]
        code = subprocess.call(
            [*command, "--out", str(tmp_path)], cwd=REPOSITORY, stdout=output, stderr=output
        )
    assert code == 0, log.read_text()[-4000:]
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())["sections"]
    assert {name: section["end"] for name, section in found.items()} == dict.fromkeys(
        sections, "done"
    )
    if "tests" in sections:
        assert found["tests"]["tests"] > 5 and not found["tests"]["failed"]
    for name in {"training", "families", "profile"} & set(sections):
        for run in found[name]["runs"]:
            assert run["samples_per_s"] > 0 and run["estimate_gib"] > 0, run
    (profiled,) = found["profile"]["runs"]
    assert 0.9 < sum(profiled["profile"]["shares"].values()) < 1.1
    (result,) = found["trl-tuned"]["peers"]
    assert result["identical_batches"] and set(result["ratio"]) == {"trl-tuned"}
    # Same weights, batches and optimizer: only the order of floating-point sums may differ.
    assert result["max_relative_loss_difference"]["trl-tuned"] < 1e-5
    assert result["losses"]["mmtrain"][-1] < result["losses"]["mmtrain"][0]
    assert "| trl-tuned |" in (tmp_path / "gpu-cpu.md").read_text()


def test_bf16_is_left_out_with_a_line_where_it_is_emulated() -> None:
    program = "from benchmarks import single_run; print(single_run.precisions({!r}, 'cpu'))"
    shown = {}
    for asked in ("both", "bf16"):
        result = subprocess.run(
            [sys.executable, "-c", program.format(asked)],
            cwd=REPOSITORY,
            env=os.environ | AVX2,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        shown[asked] = result.stdout.splitlines()
    line, measured = shown["both"]
    assert line.startswith("bf16 is left out: this CPU emulates it") and measured == "('fp32',)"
    assert shown["bf16"] == ["('bf16',)"]
