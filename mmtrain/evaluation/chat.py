"""One question to a language model behind any endpoint that speaks OpenAI's chat protocol.

Where it is and the key to it come from the environment alone: they stand in no file, argument, log
or message. What passes by itself (too many requests, a server that is down) is asked again.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from mmtrain.errors import MmtrainError

URL_VARIABLE, KEY_VARIABLE = "MMTRAIN_JUDGE_URL", "MMTRAIN_JUDGE_KEY"
_PATH = "/chat/completions"
_TRIES = 7
_LONGEST_WAIT_S = 60.0
_TIMEOUT_S = 180.0
_MOST_BYTES = 1 << 24
_TOLD_BYTES = 2000
# Not in time, in conflict with another request, too many requests; and whatever the server does.
_PASSING = (408, 409, 429)


@dataclass(frozen=True)
class Reply:
    """What the model said, and what it is billed for."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Passing(MmtrainError):
    """A fault that may be gone the next time. `wait_s`: how long the server wants to be left."""

    def __init__(self, fault: str, wait_s: float | None = None) -> None:
        super().__init__(fault, "Wait, then give the same command: what was answered is kept.")
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the server that it was given for."""

    def redirect_request(self, *_: Any) -> None:
        """Nobody is followed: the redirection is an answer like any other fault."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def request_body(model: str, prompt: str) -> dict[str, Any]:
    """The whole request: one message, and the likeliest answer to it."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
    }


def read_reply(answer: Any) -> Reply:
    """The parts of a chat completion that count here; ValueError where it is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        counts = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (AttributeError, LookupError, TypeError) as fault:
        raise ValueError("no chat completion") from fault
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    return Reply(text, *counts)


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. `key` may be missing: servers of one's own need none."""

    url: str
    key: str | None = field(repr=False)
    first_wait_s: float = 1.0

    def ask(self, model: str, prompt: str) -> Reply:
        """The model's answer, asked for again as long as only passing faults are in its way."""
        body = json.dumps(request_body(model, prompt)).encode()
        for attempt in range(_TRIES):
            try:
                return self._asked_once(body)
            except Passing as fault:
                if attempt + 1 == _TRIES:
                    raise
                wait_s = self.first_wait_s * 2**attempt if fault.wait_s is None else fault.wait_s
                time.sleep(min(wait_s, _LONGEST_WAIT_S))
        raise AssertionError("the last try answers or raises")

    def _asked_once(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
                content = answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as fault:
            raise _refused(fault) from None
        except (OSError, HTTPException) as fault:
            raise Passing(f"{self.url}: no answer ({getattr(fault, 'reason', fault)}).") from None
        try:
            return read_reply(json.loads(content))
        except (ValueError, RecursionError) as fault:
            raise Passing(f"{self.url}: its answer cannot be read ({fault}).") from None


def _refused(fault: urllib.error.HTTPError) -> MmtrainError:
    told = fault.read(_TOLD_BYTES).decode("utf-8", "replace")
    text = f"the judge's server said HTTP {fault.code} {fault.reason}: {told}"
    if fault.code in _PASSING or fault.code >= 500:
        return Passing(text, _wanted_wait_s(fault.headers))
    return MmtrainError(text, f"Check {URL_VARIABLE}, {KEY_VARIABLE} and --model.")


def _wanted_wait_s(headers: Message) -> float | None:
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdecimal() else None


def endpoint_of(environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The endpoint that the environment names."""
    url, key = (environment.get(name, "").strip() for name in (URL_VARIABLE, KEY_VARIABLE))
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        fault = f"holds '{url}', which is no address" if url else "is not set"
        raise MmtrainError(
            f"{URL_VARIABLE} {fault}.",
            "Give it an address such as https://api.openai.com/v1 or http://localhost:8000/v1,"
            f" without a key, which belongs to {KEY_VARIABLE}; or use --export, which asks nobody.",
        )
    if not (key.isascii() and key.isprintable()):
        raise MmtrainError(f"{KEY_VARIABLE} holds what no key holds.", "Copy it again.")
    whole = url if parts.path.endswith(_PATH) else url.rstrip("/") + _PATH
    return Endpoint(whole, key or None)
