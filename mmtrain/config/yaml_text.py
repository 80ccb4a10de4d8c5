"""YAML as people mean it: `2e-4` is a number, `on` is text, a key given twice is an error.

YAML 1.1, which PyYAML reads, takes `2e-4` for text, `010` for 8, `12:30` for 750 and `no` for
false. Reading and writing here use YAML 1.2's scalars instead, so that what is written is what
is read back.

What a file may ask of the reader is bounded before anything is built from it: its size, how deep
it nests, and how large its aliases make it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmtrain.errors import ConfigError

# A run file has a few kB. The reader takes about a second for 100 kB.
MAX_FILE_BYTES = 2**18
_MAX_DEPTH = 50
# Nodes and characters, aliases written out: a file of the size above has fewer without them.
_MAX_SIZE = 500_000
_MAX_INTEGER_DIGITS = 18
# NUL ends a path, and half of a surrogate pair cannot be written anywhere.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")

_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
# A dot or an exponent is required: `007` is a name, not seven.
_NUMBER = re.compile(
    r"^(?:[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"^<<$")


_SCALARS: list[tuple[str, re.Pattern[str], list[str]]] = [
    ("tag:yaml.org,2002:bool", _TRUTH, list("tTfF")),
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789.")),
    ("tag:yaml.org,2002:merge", _MERGE, ["<"]),
]


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _SCALARS:
        for character in first_characters:
            table.setdefault(character, []).append((tag, pattern))
    return table


class _Expanded(NamedTuple):
    """What a node is with every alias in it written out."""

    size: int  # nodes and characters
    depth: int


class _Loader(yaml.SafeLoader):
    """Safe loader that notes keys given twice instead of keeping the last one silently."""

    yaml_implicit_resolvers = _resolvers()

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []
        self._depth = 0
        self._expanded: dict[int, _Expanded] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, which is plain data of a bounded size; else it is an error."""
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            written = tag.replace("tag:yaml.org,2002:", "!!")
            raise _fault(event, f"tags are not read here; remove '{written}'")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _fault(event, "nested too deeply")
        node = super().compose_node(parent, index)
        assert node is not None, "the end of a collection is no node"
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._expanded:
            raise _fault(event, f"circular: *{event.anchor} stands inside of itself")
        expanded = self._expanded[id(node)] = self._written_out(node)
        self._depth -= 1
        if self._depth + expanded.depth > _MAX_DEPTH:
            raise _fault(event, "nested too deeply by its alias")
        if expanded.size > _MAX_SIZE:
            raise _fault(event, "its aliases make it too large; write out what is meant")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written: merging adds keys to it, which are no repeats."""
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault(key, "a key must be plain text")
            line = key.start_mark.line + 1
            if key.value in first_line:
                self.duplicates.append(
                    f"line {line}: '{key.value}' is given twice (first on line "
                    f"{first_line[key.value]}); remove one"
                )
            first_line.setdefault(key.value, line)
        return node

    def _written_out(self, node: yaml.Node) -> _Expanded:
        if isinstance(node, yaml.ScalarNode):
            if _UNUSABLE.search(node.value):
                raise _fault(node, "a NUL or half of a surrogate pair is no text; remove it")
            return _Expanded(1 + len(node.value), 1)
        is_mapping = isinstance(node, yaml.MappingNode)
        children = [part for pair in node.value for part in pair] if is_mapping else node.value
        parts = [self._expanded[id(child)] for child in children]
        depth = 1 + max((part.depth for part in parts), default=0)
        return _Expanded(1 + sum(part.size for part in parts), depth)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number that every reader of the run file can hold."""
        digits = node.value.replace("_", "").lstrip("+-")
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise _fault(node, f"a whole number has at most {_MAX_INTEGER_DIGITS} digits")
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """A mapping whose keys are text as written."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


# PyYAML looks constructors up by tag, not by name.
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _fault(at: Any, problem: str) -> yaml.MarkedYAMLError:
    """A fault at a node or an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _resolvers_of_both_versions() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    ours, theirs = _resolvers(), yaml.SafeDumper.yaml_implicit_resolvers
    return {key: [*ours.get(key, []), *theirs.get(key, [])] for key in {*ours, *theirs}}


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which a reader of YAML 1.1 or 1.2 would take for a value."""

    yaml_implicit_resolvers = _resolvers_of_both_versions()

    def ignore_aliases(self, data: object) -> bool:
        return True


def parse(text: str) -> tuple[object, list[str]]:
    """The plain data of a YAML text, and what is wrong with it (then the data may be None)."""
    duplicates: list[str] = []
    try:
        loader = _Loader(text)
        duplicates = loader.duplicates
        # Through JSON: what an alias repeats must not be one object, which a change would share.
        return json.loads(json.dumps(loader.get_single_data())), duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return None, [*duplicates, f"{where}not valid YAML: {_whole_sentence(error)}"]
    except (yaml.YAMLError, ValueError) as error:
        return None, [*duplicates, f"not valid YAML: {' '.join(str(error).split())}"]


def _whole_sentence(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)  # PyYAML begins some in the context: 'but found another document'
    return f"{error.context} {problem}" if problem.startswith("but ") else problem


def read_text(path: str | Path, remedy: str) -> str:
    """The text of a file of settings; `remedy` says what to give where there is none."""
    try:
        with open(path, "rb") as file:  # no more than needed: it may have no end, as /dev/zero
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES >> 10} KiB are no settings; {remedy}")
        return content.decode()
    except FileNotFoundError:
        raise ConfigError([f"there is no such file; {remedy}"], str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read as text: {error}"], str(path)) from None


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to equal data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
