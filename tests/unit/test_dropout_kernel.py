"""The GPU's dropout kernel computes what the plain operators do, element for element."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.models import dropout_mask
from tests.tiny import REPOSITORY


def test_the_kernel_equals_the_operators_in_tritons_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.interpreted_masks"],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    differing = json.loads(result.stdout)
    assert len(differing) == 6 and set(differing.values()) == {0}, differing


@pytest.mark.parametrize("layout", ["packed", "padded", "attention"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_cards_that_are_not_here(
    layout: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code: the interpreter allows what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmtrain.models.dropout_kernel import _keep_or_zero

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": "*bf16", "out": "*bf16", "rows": "*i64", "token_index": "*i64", "step": "*i32"}
    constants = {"IS_PACKED": layout == "packed", "HAS_HEADS": layout == "attention", "BLOCK": 1024}
    signature = {name: types.get(name, "i32") for name in _keep_or_zero.arg_names}
    signature |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_keep_or_zero, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_where_the_kernel_does_not_run_the_operators_do(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Triton, no driver, a compiler that fails: a warning, once."""
    monkeypatch.setitem(sys.modules, "mmtrain.models.dropout_kernel", None)
    dropout_mask._kernel.cache_clear()
    with caplog.at_level(logging.WARNING, "mmtrain"):
        assert dropout_mask._kernel() is None and dropout_mask._kernel() is None
    dropout_mask._kernel.cache_clear()
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert "no working Triton" in caplog.text
