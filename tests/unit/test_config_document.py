"""docs/run-file.md is what the schema says now."""

from __future__ import annotations

from pathlib import Path

from mmtrain import plugins
from mmtrain.commands.document import run_file_markdown
from mmtrain.config.schema import ComponentConfig, OptimConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "run-file.md"


def test_the_page_is_current() -> None:
    remedy = "run: python -m mmtrain.commands.document > docs/run-file.md"
    assert PAGE.read_text(encoding="utf-8") == run_file_markdown(), remedy


def test_the_page_shows_every_key_with_its_limits() -> None:
    page = run_file_markdown()
    for key in [*OptimConfig.model_fields, *ComponentConfig.model_fields]:
        assert f"| `{key}` |" in page
    assert "| `warmup_ratio` | number ≥ 0, < 1 |" in page
    assert '| `every` | `"epoch"` or whole number ≥ 1 |' in page
    assert "| `family` | text | required |" in page
    assert all(f"### method: {name}" in page for name in plugins.names("method"))
