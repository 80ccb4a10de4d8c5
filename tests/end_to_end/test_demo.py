"""The demo's files are sound; as a soak, the whole demo runs, and runs again on what it left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

DEMO = tiny.REPOSITORY / "docs" / "examples" / "demo"


def test_run_files_and_study_are_sound() -> None:
    from mmtrain.resolve import resolve
    from ray_tune.study import load_study
    from ray_tune.trials import expand

    for name in ("base.yaml", "adapt.yaml"):
        assert resolve(DEMO / name, world_size=2).components
    assert len(expand(load_study(DEMO / "study.yaml"))) == 8


@pytest.mark.soak
def test_the_whole_demo_and_its_second_run(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "run_demo.py")]
    began_s = time.monotonic()
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    first_s = time.monotonic() - began_s
    assert (tmp_path / "demo_output" / "study" / "comparison.html").stat().st_size > 0
    assert "held-out digits read" in first.stdout and "gain" in first.stdout.lower()
    began_s = time.monotonic()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("finished before, reused") == 7
    assert time.monotonic() - began_s < first_s / 4
