"""The house rules that a machine can check. Sources are parsed, never imported: no torch here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from mccabe import PathGraphingAstVisitor

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmtrain", "launcher", "data_shards", "ray_tune")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COMPLEXITY = 400, 60, 8

PLUGIN_FOLDERS = {
    "mmtrain/models/families": "FAMILY",
    "mmtrain/peft/methods": "METHOD",
    "mmtrain/tasks/datasets": "TASK",
}
# What only one place may touch: a dotted prefix -> the files or folders that may.
RESERVED = {
    "deepspeed.initialize": ("mmtrain/training/engine.py",),
    "torch.distributed": ("mmtrain/distributed.py",),
    "deepspeed.zero": ("mmtrain/distributed.py",),
    "deepspeed.comm": ("mmtrain/distributed.py",),
    "mlflow": ("mmtrain/tracking/",),
}
# Ways in for code that came as data, or for a shell.
FORBIDDEN_NAMES = (
    "pickle cloudpickle dill shelve marshal os.system os.popen subprocess.getoutput "
    "subprocess.getstatusoutput yaml.load yaml.unsafe_load yaml.full_load eval exec"
).split()
FORBIDDEN_ARGUMENTS = {"shell": True, "weights_only": False, "trust_remote_code": True}


def _sources(*places: str) -> list[Path]:
    found = (path for place in places for path in (ROOT / place).rglob("*.py"))
    return sorted(path for path in found if not path.is_relative_to(ROOT / ".venv"))


EVERYTHING = _sources(*PACKAGES, "tests", "benchmarks", "docs", "ds_configs")
SHIPPED = _sources(*PACKAGES)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, read or called, aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                aliases[item.asname or item.name.split(".")[0]] = (
                    item.name if item.asname else item.name.split(".")[0]
                )
                yield node.lineno, item.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
                yield node.lineno, f"{node.module}.{item.name}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and (dotted := _dotted(node)):
            first, _, rest = dotted.partition(".")
            full = aliases.get(first, first)
            yield node.lineno, f"{full}.{rest}" if rest else full


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _violations(
    paths: list[Path], check: Callable[[Path, ast.Module], Iterator[str]]
) -> dict[str, list[str]]:
    found = {_name(path): sorted(set(check(path, _tree(path)))) for path in paths}
    return {name: problems for name, problems in found.items() if problems}


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_are_short() -> None:
    sizes = {_name(path): len(path.read_text("utf-8").splitlines()) for path in EVERYTHING}
    assert len(sizes) > 20, "the sources were not found"
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        for function in _functions(tree):
            if _num_lines(function) > MAX_FUNCTION_LINES:
                yield f"{function.name}: {_num_lines(function)} lines"

    assert _violations(EVERYTHING, check) == {}


def test_functions_are_simple() -> None:
    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        visitor = PathGraphingAstVisitor()
        visitor.preorder(tree, visitor)
        for graph in visitor.graphs.values():
            if graph.complexity() > MAX_COMPLEXITY:
                yield f"{graph.entity}: complexity {graph.complexity()}"

    assert _violations(EVERYTHING, check) == {}


def test_public_things_in_the_packages_have_a_docstring() -> None:
    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not node.name.startswith("_") and ast.get_docstring(node) is None:
                    yield node.name

    assert _violations(SHIPPED, check) == {}


@pytest.mark.parametrize("reserved", RESERVED)
def test_reserved_interfaces_are_used_in_one_place(reserved: str) -> None:
    allowed = RESERVED[reserved]

    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        if not _name(path).startswith(allowed):
            for line, name in _names_used(tree):
                if _within(name, reserved):
                    yield f"line {line}: {name}"

    assert _violations(SHIPPED, check) == {}


def _is_forbidden(name: str) -> bool:
    return any(_within(name, forbidden) for forbidden in FORBIDDEN_NAMES)


def test_nothing_executes_data_or_a_shell() -> None:
    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        for line, name in _names_used(tree):
            if _is_forbidden(name):
                yield f"line {line}: {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                if node.arg in FORBIDDEN_ARGUMENTS:
                    if node.value.value is FORBIDDEN_ARGUMENTS[node.arg]:
                        yield f"line {node.value.lineno}: {node.arg}={node.value.value}"

    assert _violations(SHIPPED, check) == {}


def test_torch_load_names_weights_only() -> None:
    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _dotted(node.func) == "torch.load":
                if "weights_only" not in {keyword.arg for keyword in node.keywords}:
                    yield f"line {node.lineno}: torch.load without weights_only=True"

    assert _violations(SHIPPED, check) == {}


def _plugins(folder: str) -> list[Path]:
    """The file of every plug-in: its own, or the `__init__.py` of its folder."""
    modules = (path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
    return sorted([*modules, *(ROOT / folder).glob("*/__init__.py")])


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_one_file_rule(folder: str) -> None:
    """A plug-in is one file or folder with one constant, and nothing outside of it names it."""
    constant = PLUGIN_FOLDERS[folder]
    plugins = _plugins(folder)
    assert plugins, f"{folder} holds no plug-in"
    for path in plugins:
        exported = {
            target.id
            for node in _tree(path).body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        assert constant in exported, f"{_name(path)} exports no {constant}"
    registry = ROOT / folder / "__init__.py"
    assert not _tree(registry).body[1:], f"{_name(registry)} is more than a docstring"

    def check(path: Path, tree: ast.Module) -> Iterator[str]:
        inside = path.relative_to(ROOT / folder).parts if path.is_relative_to(ROOT / folder) else ()
        own = ".".join([*folder.split("/"), *inside[:1]]) if len(inside) > 1 else None
        for line, name in _names_used(tree):
            if name.startswith(folder.replace("/", ".") + ".") and not (own and _within(name, own)):
                yield f"line {line}: {name}"

    assert _violations(SHIPPED, check) == {}


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    found = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in _sources(*PACKAGES, "benchmarks")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if later.search(line)
    ]
    assert found == []


# Declared, and needed by a library that imports it only where a file asks for it.
NOT_IMPORTED = {"protobuf": "transformers reads tokenizer.model with it"}
# Imported where there, and done without where not.
NOT_DECLARED = {
    "triton": "torch's builds for GPUs bring it; the tests interpret it on a CPU",
    "lmms_eval": "it imports our module for it, and nothing else does; the extra is `lmms-eval`",
    "bitsandbytes": "the extra `quantization` brings it; a run that needs it says so",
}


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported_modules() -> dict[str, str]:
    """Top-level modules of others that the packages import -> one place that does."""
    ours = {*PACKAGES, *sys.stdlib_module_names}
    found: dict[str, str] = {}
    for path in SHIPPED:
        for node in ast.walk(_tree(path)):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - ours:
                found[module] = f"{_name(path)}:{node.lineno}"
    return found


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"].split()
    declared = {_canonical(re.split(r"[\[<>=!~;]", line)[0]) for line in lines}
    modules = _imported_modules()
    # Several distributions may bring parts of one module: mlflow and mlflow-skinny.
    installed = packages_distributions()
    owners = {
        module: {_canonical(owner) for owner in installed.get(module, [module])}
        for module in modules
    }
    undeclared = {module for module in modules if not owners[module] & declared}
    assert undeclared == set(NOT_DECLARED), [modules[module] for module in undeclared]
    assert declared - set().union(*owners.values()) == set(NOT_IMPORTED)


def test_import_contracts(tmp_path: Path) -> None:
    program = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", program, "--cache-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_command_starts_without_the_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "deepspeed", "ray", "mlflow", "matplotlib")
    program = (
        "import sys, mmtrain.__main__\n"
        "try: mmtrain.__main__.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "LOADED []" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import deepspeed as ds\nds.initialize()", "deepspeed.initialize"),
        ("from torch import distributed as d\nd.barrier()", "torch.distributed.barrier"),
        ("import torch.distributed", "torch.distributed"),
        ("from os import system\nsystem('ls')", "os.system"),
    ],
)
def test_the_rules_see_through_aliases(source: str, name: str) -> None:
    assert name in {used for _, used in _names_used(ast.parse(source))}
