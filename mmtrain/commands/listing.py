"""The subcommands, found without importing them."""

from __future__ import annotations

import ast
import pkgutil
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

ENTRY_POINT_GROUP = "mmtrain.commands"


def find_commands() -> dict[str, str]:
    """Command name -> module: this folder's modules that have a HELP line, and entry points."""
    own = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    commands = {name: f"{__package__}.{name}" for name in own}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        commands[entry.name] = entry.module
    return {name: module for name, module in commands.items() if help_line(module)}


def help_line(module: str) -> str:
    """The module's HELP text, read from its source; '' for what is no command."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            return str(ast.literal_eval(node.value))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "HELP" and node.value:
            return str(ast.literal_eval(node.value))
    return ""
