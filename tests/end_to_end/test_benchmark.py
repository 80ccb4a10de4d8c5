"""The benchmark runs, compares like with like, and keeps what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import single_run
from tests.tiny import AVX2, REPOSITORY


def test_single_run_beside_trl(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    shape = ["--threads", "1", "--dtype", "fp32", "--windows", "1", "--steps", "2", "--batch", "4"]
    assert single_run.main([*shape, "--out", str(out)]) == 0

    record = json.loads(out.read_text())
    (result,) = record["results"]
    assert result["identical_batches"]
    assert len(result["losses"]["mmtrain"]) == 4
    # Same weights, batches and optimizer: only the order of floating-point sums may differ.
    assert max(result["max_relative_loss_difference"].values()) < 1e-5
    assert result["losses"]["mmtrain"][-1] < result["losses"]["mmtrain"][0]
    assert set(result["ratio"]) == {"trl", "trl-tuned"}
    assert "| fp32 |" in out.with_suffix(".md").read_text()


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
