"""One question over HTTP: faults that pass, an environment that names nobody, a hidden key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmtrain.errors import MmtrainError
from mmtrain.evaluation.chat import Endpoint, endpoint_of
from tests.unit.chat_server import Server, completion, listening, rated

KEY = "sk-not-to-be-seen-anywhere"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with listening() as found:
        yield found


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', completion("x")[:-5]])
def test_what_is_no_completion_is_asked_for_again(server: Server, body: bytes) -> None:
    server.reply = lambda count, prompt: (200, {}, body) if count < 3 else rated(1)
    endpoint = Endpoint(f"{server.url}/chat/completions", None, first_wait_s=0.001)
    assert endpoint.ask("m", "said 1").text.endswith("Rating: 1")
    assert server.keys == {None}, "no key, no header"
    server.reply = lambda count, prompt: (200, {}, body)
    with pytest.raises(MmtrainError, match="cannot be read.*Wait, then give the same command"):
        endpoint.ask("m", "said 1")


def test_nobody_listens(server: Server) -> None:
    with pytest.raises(MmtrainError, match="no answer.*Wait"):
        Endpoint("http://127.0.0.1:9/v1/chat/completions", None, 0.001).ask("m", "p")


@pytest.mark.parametrize(
    ("url", "key", "fault"),
    [
        ("", "", "MMTRAIN_JUDGE_URL is not set"),
        ("file:///etc/passwd", "", "which is no address"),
        ("https://me:word@host/v1", "", "which is no address"),
        ("https://[host/v1", "", "which is no address"),
        ("https://host/v1", f"{KEY}\nX: y", "holds what no key holds"),
    ],
)
def test_an_environment_that_names_no_endpoint(url: str, key: str, fault: str) -> None:
    with pytest.raises(MmtrainError, match=fault) as caught:
        endpoint_of({"MMTRAIN_JUDGE_URL": url, "MMTRAIN_JUDGE_KEY": key})
    assert KEY not in str(caught.value) and "word" not in str(caught.value)


def test_the_endpoint_of_an_environment() -> None:
    found = endpoint_of({"MMTRAIN_JUDGE_URL": "https://host/v1/", "MMTRAIN_JUDGE_KEY": f" {KEY}\n"})
    assert found == Endpoint("https://host/v1/chat/completions", KEY)
    assert KEY not in repr(found)
    whole = {"MMTRAIN_JUDGE_URL": "http://host:8000/v1/chat/completions"}
    assert endpoint_of(whole) == Endpoint("http://host:8000/v1/chat/completions", None)
