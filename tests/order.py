"""Cheap tests run first, so that a broken clone shows within a minute."""

from __future__ import annotations

import pytest

# By what one test costs: functions and small models, models of every family, groups, commands.
FOLDERS = ("unit", "contracts", "gpu", "distributed", "end_to_end")


def cost(item: pytest.Item) -> tuple[int, bool]:
    """Where an item's file stands: by its folder, and files that need no tensors before others."""
    folder = item.path.parent.name
    module = item.getparent(pytest.Module)
    needs_tensors = module is not None and "torch" in vars(module.obj)
    return (FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)), needs_tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A stable sort by file: fixtures of a module are made once."""
    items.sort(key=cost)
