"""Cheap tests run first, so that a broken clone shows within a minute; groups never together.

`make test` has two workers (pytest-xdist). A file is one worker's, its fixtures are made once. What
starts groups of processes is one worker's from the first minute: its ranks wait for each other a
third of the time, which is enough for the other worker to get through everything else.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

# By what one test costs: functions and small models, single commands, models of every family,
# groups of processes, whole studies.
FOLDERS = ("unit", "commands", "contracts", "gpu", "distributed", "end_to_end")
GROUPS = "groups of processes"


def cost(item: pytest.Item) -> tuple[bool, int, bool]:
    """Where an item's file stands: by its folder, and files that need no tensors before others.

    A worker of several has the groups first: whoever is not given them does all else in order.
    """
    folder = item.path.parent.name
    module = item.getparent(pytest.Module)
    needs_tensors = module is not None and "torch" in vars(module.obj)
    waits = hasattr(item.config, "workerinput") and lane(item.nodeid) != GROUPS
    place = FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
    return waits, place, needs_tensors


def lane(node_id: str) -> str:
    """Tests of one lane run one after another, on one worker."""
    file = PurePath(node_id.split("::")[0])
    return GROUPS if file.parent.name in ("distributed", "end_to_end") else str(file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A stable sort by file: fixtures of a module are made once."""
    items.sort(key=cost)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lanes in the order of the sort; xdist's own groups need names that pytest no longer has."""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid)

    return Lanes(config, log)
