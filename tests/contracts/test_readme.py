"""Every command in README.md is executed: here when it is quick, else by the test that owns it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Commands that need a build, several processes, hosts or a server -> what runs them.
OWNED = {
    "make demo": "tests/end_to_end/test_demo.py",
    "make test": ".ci/run",
    "make test-all": "Makefile",
    "make lint": ".ci/run",
    "make benchmark": "tests/commands/test_benchmark.py",
    "make gpu": "tests/commands/test_benchmark.py",
    "mmtrain train run.yaml --max-steps 5": "tests/commands/test_commands.py",
    "mmtrain train run.yaml --overfit 16": "tests/commands/test_commands.py",
    "mmtrain launch run.yaml --hostfile hosts": "tests/distributed/test_two_hosts.py",
    "deepspeed --hostfile hosts --module mmtrain train run.yaml": (
        "tests/distributed/test_two_hosts.py"
    ),
}


def _fenced(languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of every shell block, in the README's order."""
    found = []
    for block in _fenced("console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append(" ".join(line[2:].split()))
    for block in _fenced("bash|sh|shell"):
        lines = block.replace("\\\n", " ").splitlines()
        found += [" ".join(line.split()) for line in lines if line.strip() and line[0] != "#"]
    return list(dict.fromkeys(found))


RUN_HERE = [command for command in commands() if command not in OWNED]


def test_every_owner_exists_and_every_owned_command_is_in_the_readme() -> None:
    assert RUN_HERE, "the README shows no command"
    assert {name for name in OWNED if name not in commands()} == set()
    assert {owner for owner in OWNED.values() if not (ROOT / owner).is_file()} == set()


def test_quick_commands_run_one_after_the_other(tmp_path: Path) -> None:
    for command in RUN_HERE:
        words = shlex.split(command)
        assert (
            words[0] == "mmtrain"
        ), f"'{command}' is neither an mmtrain command nor owned by a test"
        result = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, f"$ {command}\n{result.stdout}{result.stderr}"


def test_make_gpu_installs_nothing(tmp_path: Path) -> None:
    """It takes the environment that is there, else the Python that was given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    # `make test` runs this, too: its child would say which folder it enters, unless told not to.
    command = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=python3.13"]
    for python in ("python3.13", ".venv/bin/python"):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout == f"{python} -m benchmarks.gpu\n", result.stderr
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv" / "bin" / "python").touch()


@pytest.mark.parametrize("number", range(len(_fenced("yaml"))))
def test_run_files_are_valid(tmp_path: Path, number: int) -> None:
    from mmtrain.resolve import resolve

    run_file = tmp_path / "run.yaml"
    run_file.write_text(_fenced("yaml")[number], encoding="utf-8")
    assert resolve(run_file).components


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
