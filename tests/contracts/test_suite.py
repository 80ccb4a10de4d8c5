"""The suite's own promises: what CI never skips, what is said elsewhere, which tests come first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

CI_MINUTES, TEST_MINUTES = 90, 60

SKIPPED_IN_MANY_WAYS = {
    "mark": "import pytest\n@pytest.mark.skip(reason='why')\ndef test_it(): pass\n",
    "call": "import pytest\ndef test_it(): pytest.skip('why')\n",
    "import": "import pytest\npytest.importorskip('absent', reason='why')\ndef test_it(): pass\n",
}
XFAIL = "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n"
PASSES = "def test_it(): pass\n"


def run_pytest(
    folder: Path, sources: Mapping[str, str], ci: str, plugin: str = "no_skips", *options: str
) -> subprocess.CompletedProcess[str]:
    """A suite of its own: one test file per folder, and a plug-in of ours as its conftest."""
    for place, source in sources.items():
        (folder / "tests" / place).mkdir(parents=True)
        name = place.replace("/", "_")
        (folder / "tests" / place / f"test_{name}.py").write_text(source)
    shutil.copy(REPOSITORY / "tests" / f"{plugin}.py", folder / "tests" / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        [*command, "tests"], cwd=folder, capture_output=True, text=True, env=os.environ | {"CI": ci}
    )


@pytest.mark.parametrize("way", SKIPPED_IN_MANY_WAYS)
def test_ci_forbids_skips_of_distributed_tests(tmp_path: Path, way: str) -> None:
    result = run_pytest(tmp_path, {"distributed": SKIPPED_IN_MANY_WAYS[way]}, ci="true")
    assert result.returncode in {1, 2} and "may not be skipped in CI" in result.stdout
    assert "why" in result.stdout


@pytest.mark.parametrize(
    ("place", "source", "ci"),
    [
        ("unit", SKIPPED_IN_MANY_WAYS["call"], "true"),
        ("distributed", XFAIL, "true"),
        ("distributed", PASSES, ""),
    ],
)
def test_other_skips_are_allowed_and_no_matter(
    tmp_path: Path, place: str, source: str, ci: str
) -> None:
    result = run_pytest(tmp_path, {place: source}, ci)
    assert result.returncode == 0 and "NOT RUN HERE" not in result.stdout, result.stdout


@pytest.mark.parametrize("way", SKIPPED_IN_MANY_WAYS)
def test_elsewhere_the_last_line_but_one_says_what_was_left_out(tmp_path: Path, way: str) -> None:
    sources = {"unit": PASSES, "distributed": SKIPPED_IN_MANY_WAYS[way]}
    result = run_pytest(tmp_path, sources, ci="")
    assert result.returncode == 0, result.stdout
    said = result.stdout.splitlines()[-2]
    assert said == "NOT RUN HERE: 1 of tests/distributed/test_distributed.py, why"


def test_a_missing_program_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.distributed import netns

    for tool in ("ip", "ssh", "ssh-keygen"):
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setattr(netns, "_places", lambda: str(tmp_path))
    wanted = "no sshd, pdsh here: apt-get install -y openssh-server pdsh"
    assert netns.why_not() == wanted


def test_cheap_folders_run_first(tmp_path: Path) -> None:
    places = ("contracts", "distributed", "end_to_end", "unit")
    result = run_pytest(tmp_path, dict.fromkeys(places, PASSES), ci="", plugin="order")
    ran = re.findall(r"^tests/(\w+)/\S+ PASSED", result.stdout, flags=re.MULTILINE)
    assert ran == ["unit", "contracts", "distributed", "end_to_end"], result.stdout


def test_files_are_not_torn_apart_and_dear_tests_never_run_together(tmp_path: Path) -> None:
    two_tests = "import time\ndef test_a(): time.sleep(0.1)\ndef test_b(): time.sleep(0.1)\n"
    places = ("contracts", "unit", "distributed", "end_to_end")
    options = ("-n", "2", "--no-loadscope-reorder")
    result = run_pytest(tmp_path, dict.fromkeys(places, two_tests), "", "order", *options)
    ran = re.findall(r"^\[(gw\d)\].* PASSED tests/(\w+)/", result.stdout, flags=re.MULTILINE)
    assert len(ran) == 2 * len(places), result.stdout
    workers = {place: {worker for worker, one in ran if one == place} for place in places}
    assert all(len(found) == 1 for found in workers.values()), ran
    assert workers["distributed"] == workers["end_to_end"], ran
    assert workers["distributed"].isdisjoint(workers["unit"]), ran


def test_this_suite_is_in_order(request: pytest.FixtureRequest) -> None:
    """Every folder has its place in the order, and no file is torn apart."""
    from tests.order import cost

    costs = [cost(item) for item in request.session.items]
    assert costs == sorted(costs)
    files = [item.path for item in request.session.items]
    changes = sum(one != other for one, other in zip(files, files[1:]))
    assert changes == len(set(files)) - 1


def test_ci_gives_a_slow_machine_its_time_and_ends_all_the_same() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    minutes = {words: int(number) for number, words in re.findall(r"timeout (\d+)m (.+)", script)}
    assert next(minutes[words] for words in minutes if "make test" in words) == TEST_MINUTES
    assert len(minutes) == 5 and sum(minutes.values()) <= CI_MINUTES, minutes
