"""A server that speaks as much of OpenAI's chat protocol as a judge needs, for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """What a test's server was asked, and how it answers: status, headers, body."""

    reply: Callable[[int, str], tuple[int, dict[str, str], bytes]]
    url: str = ""
    prompts: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)


def completion(text: str) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    answer = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
    return json.dumps(answer).encode()


def rated(number: int) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, completion(f"It is so.\nRating: {number}")


@contextmanager
def listening() -> Iterator[Server]:
    """Answers on this machine until the end of the block."""
    state = Server(lambda count, prompt: rated(5))
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (message,) = body["messages"]
            with guard:
                state.prompts.append(message["content"])
                state.paths.add(self.path)
                state.keys.add(self.headers["Authorization"])
                count = len(state.prompts)
            status, headers, content = state.reply(count, message["content"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
