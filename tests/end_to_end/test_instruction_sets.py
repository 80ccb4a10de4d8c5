"""What holds on any CPU: the numeric tests and the demo again, this machine playing an AVX2 one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import AVX2, REPOSITORY


def numeric_tests() -> list[str]:
    """Files whose tests compute with tensors, and the runs of process groups."""
    tests = REPOSITORY / "tests"
    found = [
        path
        for folder in ("unit", "contracts")
        for path in sorted((tests / folder).glob("test_*.py"))
        if "import torch" in path.read_text(encoding="utf-8")
    ]
    groups = (
        tests / "distributed" / f"test_{name}.py" for name in ("invariants", "families_train")
    )
    return [str(path.relative_to(REPOSITORY)) for path in (*found, *groups)]


@pytest.mark.soak
def test_the_numeric_tests_pass_on_avx2() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-m", "not soak and not gpu", *numeric_tests()],
        cwd=REPOSITORY,
        env=os.environ | AVX2,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.soak
def test_the_demo_learns_to_read_on_avx2(tmp_path: Path) -> None:
    """It ends with an error where the model does not read as it should."""
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "docs" / "examples" / "demo" / "run_demo.py")],
        cwd=tmp_path,
        env=os.environ | AVX2,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
