"""YAML as people mean it: `2e-4` is a number, `on` is text, a key given twice is an error.

YAML 1.1, which PyYAML reads, takes `2e-4` for text, `010` for 8, `12:30` for 750 and `no` for
false. Reading and writing here use YAML 1.2's scalars instead, so that what is written is what
is read back.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

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


class _Loader(yaml.SafeLoader):
    """Safe loader that notes keys given twice instead of keeping the last one silently."""

    yaml_implicit_resolvers = _resolvers()

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are text as written."""
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key.start_mark
                )
            line = key.start_mark.line + 1
            if key.value in first_line:
                self.duplicates.append(
                    f"line {line}: '{key.value}' is given twice (first on line "
                    f"{first_line[key.value]}); remove one"
                )
            first_line.setdefault(key.value, line)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def _resolvers_of_both_versions() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    ours, theirs = _resolvers(), yaml.SafeDumper.yaml_implicit_resolvers
    return {key: [*ours.get(key, []), *theirs.get(key, [])] for key in {*ours, *theirs}}


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which a reader of YAML 1.1 or 1.2 would take for a value."""

    yaml_implicit_resolvers = _resolvers_of_both_versions()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse(text: str) -> tuple[Any, list[str]]:
    """The plain data of a YAML text, and what is wrong with it (then the data may be None)."""
    duplicates: list[str] = []
    try:
        loader = _Loader(text)
        duplicates = loader.duplicates
        # Through JSON: nothing but plain data leaves here, and an anchor inside itself is found.
        return json.loads(json.dumps(loader.get_single_data(), default=str)), duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return None, [*duplicates, f"{where}not valid YAML: {error.problem}"]
    except (yaml.YAMLError, ValueError) as error:
        return None, [*duplicates, f"not valid YAML: {' '.join(str(error).split())}"]
    except RecursionError:
        return None, [*duplicates, "not valid YAML: nested too deeply"]


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to equal data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
