"""The record of a card outlives whatever fails, and tells dropout from other work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.kernels import kind_of
from benchmarks.gpu.report import markdown
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.results import RESULTS

QUICK = ["this"]  # a module of Python's own that prints something and ends well


def _command(device: str, scratch: Path) -> list[str]:
    return QUICK


def _unprepared(device: str, scratch: Path) -> list[str]:
    raise KeyError("no such preset")


def _uncollected(scratch: Path) -> dict[str, Any]:
    return json.loads("{")


def _nothing(scratch: Path) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("gpu-*.json")), ids=lambda path: path.stem)
def test_every_record_that_is_kept_can_be_shown(path: Path) -> None:
    record = json.loads(path.read_text())
    lines = markdown(record)
    assert [line[3:] for line in lines if line.startswith("## ")] == list(record["sections"])
    record["sections"]["of-an-older-version"] = {}
    assert markdown(record) == lines


def test_a_section_that_fails_is_a_record_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "training": Section("training", "", 60, _unprepared, _nothing),
        "profile": Section("profile", "", 60, _command, _uncollected),
        "families": Section("families", "", 60, _command, _nothing),
    }
    monkeypatch.setattr(program, "SECTIONS", sections)
    assert program.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())["sections"]
    assert found["training"]["end"] == "failed: KeyError: 'no such preset'"
    assert found["profile"]["end"].startswith("failed: JSONDecodeError: ")
    assert "Traceback" in found["training"]["log"] and "in _uncollected" in found["profile"]["log"]
    assert found["families"]["end"] == "done" and "log" not in found["families"]
    assert "## families" in (tmp_path / "gpu-cpu.md").read_text()


def test_runs_before_half_a_line_are_kept(tmp_path: Path) -> None:
    lines = '{"gemm_tflops": 7.0}\n{"name": "whole"}\n{"name": "cu'
    (tmp_path / "runs.jsonl").write_text(lines)
    found = SECTIONS["training"].collect(tmp_path)
    assert found == {"runs": [{"name": "whole"}], "gemm_tflops": 7.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_Drop", "dropout"),
        ("_DropBackward", "dropout"),
        ("autograd::engine::evaluate_function: _DropBackward", "dropout"),
        ("mmtrain::keyed_masks", "dropout"),
        ("aten::native_dropout", "dropout"),
        ("aten::bitwise_xor", "dropout"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::mm", "matrix products"),
        ("aten::mul", "elementwise and copies"),
    ],
)
def test_the_kind_of_an_operator(name: str, kind: str) -> None:
    assert kind_of(name, [[2, 8], [8, 8]], rank=4) == kind


def test_products_with_a_side_of_the_rank_are_the_adapters() -> None:
    assert kind_of("aten::mm", [[2, 8], [8, 4]], rank=4) == "adapter products"
