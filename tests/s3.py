"""A local server that speaks S3, and fails when it is told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from data_shards.push import push_folder
from mmtrain.data import remote
from mmtrain.data.cache import GIB
from mmtrain.data.manifest import read_manifest
from mmtrain.data.remote import RemoteFolder
from tests import tiny

BUCKET = "shards"
StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}

_REFUSALS = {"away": "503 Slow Down", "denied": "403 Forbidden"}


@dataclass
class Store:
    """The server's address, what was asked of it, and how it answers."""

    port: int = 0
    gets: Counter[str] = field(default_factory=Counter)  # whole or part, by the file's name
    faults: dict[str, list[str]] = field(default_factory=dict)  # by file name, one per answer

    @property
    def environment(self) -> dict[str, str]:
        """What makes any S3 library talk to it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def failing(self, inner: Application) -> Application:
        """The server with its faults before it."""

        def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
            name = environ["PATH_INFO"].rpartition("/")[2]
            if environ["REQUEST_METHOD"] != "GET":
                return inner(environ, start)
            self.gets[name] += 1
            fault = self.faults[name].pop(0) if self.faults.get(name) else ""
            if fault in _REFUSALS:
                start(_REFUSALS[fault], [("Content-Type", "text/plain")])
                return [b"no"]
            body = inner(environ, start)
            return [_altered(b"".join(body), fault)] if fault else body

        return answer


def _altered(body: bytes, fault: str) -> bytes:
    """The length that was announced stays: what is cut never comes."""
    return body[: len(body) // 2] if fault == "cut" else body[:-700] + b"#" + body[-699:]


def build_small_shards(folder: Path) -> Path:
    """Digits: twelve training shards of four samples, two of validation."""
    for split, samples in (("train", "48"), ("val", "8")):
        sizes = ("--samples-per-shard", "4", "--limit", samples)
        part = folder / f"only-{split}"
        tiny.build_digits(part, "--split", split, *sizes)
        (part / split).rename(folder / split)
    return folder


def push_all(folder: Path) -> None:
    """Both splits, into the bucket."""
    for split in ("train", "val"):
        target = RemoteFolder(f"s3://{BUCKET}/{split}")
        push_folder(folder / split, target, False, lambda done, total: None)


def gib_for(digits: Path, num_shards: float) -> float:
    """A cache for the validation shards and so many of training."""
    shards = read_manifest(digits / "train")[0].shards
    largest = max(shard.bytes for shard in shards)
    return (read_manifest(digits / "val")[0].num_bytes + num_shards * largest) / GIB


@contextmanager
def serving() -> Iterator[Store]:
    """The server, in threads of this process."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = Store()
    application = store.failing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in store.environment.items():
                patch.setenv(name, value)
            _make_bucket(store)
            yield store
    finally:
        server.shutdown()
        thread.join()


def _make_bucket(store: Store) -> None:
    """Nothing is left of an earlier server of this process, here or there."""
    import boto3

    remote._file_system.cache_clear()
    urlopen(f"http://127.0.0.1:{store.port}/moto-api/reset", data=b"").close()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
