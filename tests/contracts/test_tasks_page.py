"""docs/tasks.md is what the data sets say now."""

from __future__ import annotations

from pathlib import Path

from mmtrain import plugins
from mmtrain.commands.document_tasks import tasks_markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_the_page_is_current() -> None:
    remedy = "run: python -m mmtrain.commands.document_tasks > docs/tasks.md"
    assert PAGE.read_text(encoding="utf-8") == tasks_markdown(), remedy


def test_every_data_set_says_what_to_download_and_how_it_asks() -> None:
    page = tasks_markdown()
    for name in plugins.names("task"):
        task = plugins.load("task", name)
        assert f"\n## {name}\n" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert not task.needs_raw or "Raw" in section, f"{name} does not say what to download"
        for template in task.templates.values():
            assert template.render.__doc__, f"{name}: {template.name} does not say how it asks"
            assert f"| `{template.name}` |" in section
        for metric in task.metrics:
            assert f"`{metric.name}`" in section
