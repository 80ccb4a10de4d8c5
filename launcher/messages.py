"""The lines the launcher and its agents exchange: one JSON object per line, `kind` first.

Launcher to agent:  spec, start, alive (a sign of life).  End of input means: stop.
Agent to launcher:  hello, ready, refused, output, failed, stopped.
Framing rank output as JSON keeps it apart from these messages, whatever a rank prints.
"""

from __future__ import annotations

import json

# The launcher gives a sign of life this often; an agent that misses it for longer than the
# limit stops its ranks, so that a lost network leaves no orphans either.
ALIVE_EVERY_S = 10.0
SILENCE_LIMIT_S = 120.0


def encode(kind: str, **fields: object) -> bytes:
    """A message as one line of bytes."""
    return json.dumps({"kind": kind, **fields}, ensure_ascii=True).encode("ascii") + b"\n"


def decode(line: bytes) -> dict[str, object] | None:
    """The message in a line, or None for a line that is none (a login banner, a warning)."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "kind" in message else None
