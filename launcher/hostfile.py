"""Which hosts, and which slots on them: the hostfile and the filters that narrow it.

The parser is strict because a host name ends up in the argument list of ssh: a line that is not
exactly `host slots=n` is refused, and every bad line is reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmtrain.errors import ConfigError, nearest

MAX_SLOTS = 1024
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_HOST_NAME_RULE = (
    "use letters, digits, '.', '_' and '-', starting with a letter or digit; "
    "users and ports belong into the ssh config"
)


@dataclass(frozen=True)
class Host:
    """A host and the slots (device numbers) to use there, one rank per slot."""

    name: str
    slots: tuple[int, ...]
    # Only a filtered host needs its devices named; otherwise local rank i uses device i.
    narrowed: bool = False


def parse_hostfile(text: str, source: str = "hostfile") -> list[Host]:
    """The hosts of a hostfile: lines `host slots=n`, with comments and blank lines allowed."""
    hosts: list[Host] = []
    first_line_of: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        host, problem = _parse_line(content)
        if host is not None and host.name in first_line_of:
            problem = f"host '{host.name}' already stands in line {first_line_of[host.name]}"
        if problem or host is None:
            problems.append(f"line {number}: {problem}")
        else:
            first_line_of[host.name] = number
            hosts.append(host)
    if not hosts and not problems:
        problems.append("names no host; write one line 'host slots=n' per host")
    if problems:
        raise ConfigError(problems, source)
    return hosts


def select_hosts(hosts: list[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Narrow hosts by `host:0,1@host2`: keep only those, or drop those."""
    if include and exclude:
        raise ConfigError(["give --include or --exclude, not both"], "host selection")
    if not include and not exclude:
        return hosts
    chosen = _parse_filter(include or exclude, hosts, "--include" if include else "--exclude")
    if include:
        selected = [_narrow(host, chosen[host.name]) for host in hosts if host.name in chosen]
    else:
        kept = [(host, set(host.slots) - chosen.get(host.name, set())) for host in hosts]
        selected = [_narrow(host, slots) for host, slots in kept if slots]
    if not selected:
        raise ConfigError([f"'{include or exclude}' leaves no host to run on"], "host selection")
    return selected


def _parse_line(content: str) -> tuple[Host | None, str]:
    """The host of one line, or what is wrong with the line."""
    words = content.split()
    if not _HOST_NAME.fullmatch(words[0]):
        return None, f"'{words[0]}' is not a host name; {_HOST_NAME_RULE}"
    slots = re.fullmatch(r"slots=([0-9]{1,4})", words[1]) if len(words) == 2 else None
    if slots is None:
        return None, f"'{content}' is not of the form 'host slots=n'"
    count = int(slots[1])
    if not 1 <= count <= MAX_SLOTS:
        return None, f"slots={count} is outside 1..{MAX_SLOTS}"
    return Host(words[0], tuple(range(count))), ""


def _parse_filter(text: str, hosts: list[Host], option: str) -> dict[str, set[int]]:
    """The slots a filter names, per host; every wrong part is reported at once."""
    slots_of = {host.name: host.slots for host in hosts}
    chosen: dict[str, set[int]] = {}
    problems: list[str] = []
    for part in text.split("@"):
        name, colon, listed = part.strip().partition(":")
        numbers = [number.strip() for number in listed.split(",")] if colon else []
        if name not in slots_of:
            problems.append(f"'{name}' is not in the hostfile; {nearest(name, slots_of)}")
            continue
        valid = {str(slot): slot for slot in slots_of[name]}
        wrong = [number for number in numbers if number not in valid]
        if wrong:
            problems.append(
                f"'{part}': host '{name}' has slots 0..{len(valid) - 1}, not '{', '.join(wrong)}'"
            )
            continue
        wanted = {valid[number] for number in numbers} if colon else set(slots_of[name])
        chosen.setdefault(name, set()).update(wanted)
    if problems:
        raise ConfigError(problems, option)
    return chosen


def _narrow(host: Host, slots: set[int]) -> Host:
    """The host with only these slots."""
    return Host(host.name, tuple(sorted(slots)), narrowed=slots != set(host.slots))
