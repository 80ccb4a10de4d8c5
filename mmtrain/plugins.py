"""Plug-ins by name: a file in a folder, exporting one constant. There is no registry to edit."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mmtrain.errors import MmtrainError, nearest

# kind -> (package inside this one, the constant that each of its files exports)
_KINDS = {
    "family": ("models.families", "FAMILY"),
    "method": ("peft.methods", "METHOD"),
    "task": ("tasks.datasets", "TASK"),
}


def names(kind: str) -> list[str]:
    """Every plug-in of a kind (family, method, task), found by listing its folder."""
    package = importlib.import_module(f"{__package__}.{_KINDS[kind][0]}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(kind: str, name: str) -> Any:
    """The constant FAMILY, METHOD or TASK of the plug-in file of that name."""
    package, constant = _KINDS[kind]
    valid = names(kind)
    if name not in valid:
        raise MmtrainError(f"unknown {kind} '{name}';", nearest(name, valid))
    module = importlib.import_module(f"{__package__}.{package}.{name}")
    return getattr(module, constant)
