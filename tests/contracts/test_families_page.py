"""docs/families.md is what the families say now."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain import plugins
from mmtrain.commands.document_families import families_markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.mark.soak
def test_the_page_is_current() -> None:
    """Its memory columns plan every preset, which takes minutes."""
    remedy = "run: python -m mmtrain.commands.document_families > docs/families.md"
    assert PAGE.read_text(encoding="utf-8") == families_markdown(), remedy


def test_every_family_preset_and_component_has_its_place() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in plugins.names("family"):
        family = plugins.load("family", name)
        assert f"## {name}\n" in page
        for preset in family.presets:
            assert (f"| `{preset}` |" in page) != preset.startswith("tiny"), preset
        for component in family.components:
            assert f"| `{component}` |" in page
