"""What may be shown or stored of a text: secrets hidden, control characters escaped, length cut."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
MAX_LINE_CHARS = 1200
_TAIL_CHARS = 300
# No more is searched, from either end: what lies between is cut out of the line anyway.
_SEARCHED_CHARS = 8 * MAX_LINE_CHARS
# Up to the last @ before the path: a password may itself hold an @. After `user:` it may also
# hold a slash, unless what follows is a port.
_USERINFO = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?P<userinfo>[^/\s?#]*|[^/\s?#:@]+:(?!\d+[/?#])[^\s@]*)@"
)
_RUN = re.compile(r"\S+")
_SECRET_QUERY = re.compile(r"(?i)(?P<key>[?&](?:password|passwd|token|secret|api_key)=)[^&\s#]+")
_SECRET_VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MMTRAIN_JUDGE_KEY")
# A shorter value would be found inside ordinary words.
_SHORTEST_SECRET = 4
_SECRET_NAME = re.compile(
    r"password|passwd|passphrase|secret|credential"
    r"|(?:^|[^a-z])(?:pwd|token)(?:$|[^a-z])|(?:api|access|[_-])key(?:$|[^a-z])"
)
_CAMEL_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Possessive: what follows is in no key, so a shorter one would not fit either.
_KEY = r"(?P<key>[A-Za-z0-9_.-]{1,200}+)"
# Where a value begins, and how far it goes: in our own lines, where every sentence has a colon,
# and in what a user wrote, where a colon assigns, too.
_ASSIGNED = re.compile(_KEY + "="), re.compile(r"\"[^\"]*\"?|'[^']*'?|[^\s,;&}\])'\"]+")
_USER_ASSIGNED = re.compile(_KEY + r"[\\\"']{0,2}\s{0,9}[=:]\s{0,9}"), re.compile(r"[^,}\]\n]+")


def redact_uri(text: str) -> str:
    """The text with every `user:password@` and `?password=` of its URIs replaced by ***."""
    hidden = replace_userinfo(text, f"{HIDDEN}@")
    return _SECRET_QUERY.sub(rf"\g<key>{HIDDEN}", hidden)


def replace_userinfo(text: str, replacement: str) -> str:
    """The text with something else in place of every `user:password@` of its URIs.

    A URI is searched up to its last @ only: without one ahead, each `://` would be searched to
    the end of the line, in time that grows with the square of its length.
    """

    def replaced(run: re.Match[str]) -> str:
        before, at, after = run[0].rpartition("@")
        return _USERINFO.sub(rf"\g<scheme>{replacement}", before + at) + after

    return _RUN.sub(replaced, text)


def redact(text: str) -> str:
    """`redact_uri`, and the values of credential variables replaced by *** too."""
    text = redact_uri(text)
    for variable in _SECRET_VARIABLES:
        secret = os.environ.get(variable, "")
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def redacted(value: object, place: str = "") -> Any:
    """Plain data without secrets: `redact` in every text, *** for what a telling key holds."""
    if value not in (None, "") and is_secret_key(place):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redacted(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def is_secret_key(place: str) -> bool:
    """Whether the name of a key tells that it holds a secret: `tags.apiKey`, `db_password`."""
    return place.lower().rpartition(".")[2] == "key" or _names_a_secret(place)


def _names_a_secret(name: str) -> bool:
    """The same in free text, where `key=value` says how to write something."""
    return _SECRET_NAME.search(_CAMEL_HUMP.sub("_", name).lower()) is not None


def redact_user_text(text: str) -> str:
    """The same for text that a user wrote and that may be YAML: `{password: x}`."""
    return _without_assigned_secrets(redact(text), *_USER_ASSIGNED)


def presentable(text: str) -> str:
    """One line for a terminal or a log: no secrets, no control characters, no end without end."""
    if len(text) > 2 * _SEARCHED_CHARS:
        text = text[:_SEARCHED_CHARS] + text[-_SEARCHED_CHARS:]
    text = _without_assigned_secrets(redact(text), *_ASSIGNED)
    if not text.isprintable():
        text = "".join(map(_printable, text))
    if len(text) <= MAX_LINE_CHARS:
        return text
    return f"{text[: MAX_LINE_CHARS - _TAIL_CHARS]} […] {text[-_TAIL_CHARS:]}"


def _without_assigned_secrets(text: str, key: re.Pattern[str], value: re.Pattern[str]) -> str:
    parts: list[str] = []
    done = 0
    for found in key.finditer(text):
        # The key first: a value may reach to the end of the text, and keys are many.
        if found.start() < done or not _names_a_secret(found["key"]):
            continue
        if secret := value.match(text, found.end()):
            parts += [text[done : found.end()], HIDDEN]
            done = secret.end()
    return "".join([*parts, text[done:]])


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode()
