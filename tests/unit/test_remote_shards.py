"""Shards behind URLs, from a local server that speaks S3: whole and right, or an error by name."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_shards import command
from data_shards.push import push_folder
from data_shards.writer import ShardWriter
from mmtrain.data import remote
from mmtrain.data.cache import Blob, ShardCache
from mmtrain.data.remote import RemoteFolder, place_of_shards, url_problem
from mmtrain.data.shards import ShardFolder
from mmtrain.data.verify import verify_folder
from mmtrain.errors import ConfigError, DataError, MmtrainError
from tests.s3 import BUCKET, Store, serving
from tests.tiny import REPOSITORY
from tests.unit.test_shards import NUM_SAMPLES, SAMPLES

PER_SHARD = 4
SHARD = "shard-000002.tar"  # the one that the faults hit
INSIDE = 9  # a sample of it


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "train"
    folder.mkdir()
    writer = ShardWriter(folder, PER_SHARD)
    for sample in SAMPLES:
        writer.add(sample)
    writer.finish("digits", "train", 5, None, {"domain": "upright"})
    return folder


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[Store]:
    with serving() as store:
        assert shards("push", built.parent, f"s3://{BUCKET}/digits") == 0
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Nothing asked yet, no fault left, and no long waiting."""
    server.gets.clear()
    server.faults.clear()
    monkeypatch.setattr(remote, "_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(remote, "_OPENING_WAITS_S", (0.01,))
    return server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 2**20)


def shards(*arguments: object) -> int:
    """`mmtrain shards …` in this process."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


URL = f"s3://{BUCKET}/digits/train"


def put(name: str, content: bytes, folder: str = "digits/train") -> None:
    import boto3

    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=content)


def opened(cache: ShardCache) -> ShardFolder:
    return ShardFolder.open(URL, "digits", cache)


def held(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


# --- places -------------------------------------------------------------------------------------


def test_what_is_a_url_and_what_a_path(tmp_path: Path) -> None:
    assert place_of_shards(f"file://{tmp_path}") == tmp_path == place_of_shards(str(tmp_path))
    assert place_of_shards("a::b/c") == Path("a::b/c")
    for url in ("s3://b/x/", "gs://b/x", "memory://x", "sftp://me@host/x", "https://h/x"):
        assert place_of_shards(url) == RemoteFolder(url.rstrip("/"))


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("simplecache::s3://b/x", "chains of file systems"),
        ("sftp://me:hunter2@host/x", "with a password"),
        ("sftp://me:hun/ter2@host/x", "with a password"),
        ("https://host/x?X-Amz-Signature=hunter2", "a query"),
        ("gss://b/x", "no kind of store .* did you mean 'gs'"),
        ("s3:///", "names no folder"),
    ],
)
def test_urls_that_are_refused_and_tell_no_secret(url: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place_of_shards(url)
    assert url_problem(url) is not None
    (problem,) = caught.value.problems
    assert re.search(fault, problem) and "hunter2" not in problem


# --- healthy ------------------------------------------------------------------------------------


def test_it_reads_what_was_pushed(store: Store, cache: ShardCache, built: Path) -> None:
    folder = opened(cache)
    assert folder.digest == ShardFolder.open(built).digest
    assert [folder.read(i) for i in reversed(range(NUM_SAMPLES))] == SAMPLES[::-1]
    assert {count for name, count in store.gets.items() if name.endswith(".tar")} == {1}
    assert cache.held_bytes == sum(
        path.stat().st_size for path in built.iterdir() if path.name != "manifest.json"
    )
    store.gets.clear()
    again = opened(cache)
    assert [again.read(i) for i in range(NUM_SAMPLES)] == SAMPLES
    assert not any(name.endswith(("tar", "npy")) for name in store.gets), "all is there"
    assert store.gets["manifest.json"] == 1, "only it says what is there now"


def test_verify_and_show_take_a_url(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shards("verify", URL) == 0
    assert shards("show", URL, "--num", 2, "--out", tmp_path / "page.html") == 0
    assert "2 of 20 samples of s3://" in (tmp_path / "page.html").read_text()
    out = capsys.readouterr().out
    assert "digits" in out and "ok" in out
    assert len(list((tmp_path / "mmtrain" / "shards").glob("*.tar"))) == 5


def test_push_says_what_is_there_and_replaces_it_only_when_asked(
    store: Store, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/pushed"
    target = RemoteFolder(url)
    assert shards("push", built, url) == shards("push", built, url) == 0
    assert [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()] == [
        f"sent to {url}",
        f"is at {url} already",
    ]
    small = tmp_path / "small"
    small.mkdir()
    writer = ShardWriter(small, PER_SHARD)
    for sample in SAMPLES[:6]:
        writer.add(sample)
    writer.finish("digits", "train", 5, None, {})
    with pytest.raises(DataError, match="holds other shards"):
        push_folder(small, target, False, lambda done, total: None)
    seen: list[tuple[int, int]] = []
    push_folder(small, target, True, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and len(seen) == 2
    assert set(target.sizes()) == {path.name for path in small.iterdir()}, "nothing old is left"
    (small / "shard-000001.tar").write_bytes(
        (small / "shard-000001.tar").read_bytes().replace(b"question", b"Question")
    )
    with pytest.raises(DataError, match="is not what was built"):
        push_folder(small, RemoteFolder(f"{url}-2"), False, lambda done, total: None)
    assert "manifest.json" not in RemoteFolder(f"{url}-2").sizes(), "nobody takes it for whole"
    with pytest.raises(DataError, match="is a folder here"):
        shards("push", built, f"file://{tmp_path}/x")
    with pytest.raises(SystemExit):
        shards("build", "digits", "--out", url)
    assert "give a folder on this machine; `mmtrain shards push" in capsys.readouterr().err


# --- faults on the way --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [["away"], ["away", "away"], ["cut"], ["cut", "away"], ["flipped"]]
)
def test_a_broken_transfer_is_tried_again(
    store: Store, cache: ShardCache, faults: list[str]
) -> None:
    folder = opened(cache)
    store.faults[SHARD] = list(faults)
    assert folder.read(INSIDE) == SAMPLES[INSIDE]
    assert store.gets[SHARD] == len(faults) + 1 and not store.faults[SHARD]


def test_a_store_that_stays_away_is_named(store: Store, cache: ShardCache) -> None:
    folder = opened(cache)
    store.faults[SHARD] = ["away"] * 20
    with pytest.raises(DataError, match=f"'{URL}/{SHARD}' cannot be reached .*") as caught:
        folder.read(INSIDE)
    assert "credentials" in caught.value.remedy and "very-secret" not in str(caught.value)
    assert not [name for name in held(cache) if name.endswith("part")], "nothing half is left"
    store.faults["manifest.json"] = ["away"] * 20
    with pytest.raises(DataError, match="manifest.json' cannot be reached"):
        opened(cache)


def test_who_may_read_need_not_be_allowed_to_list(store: Store, cache: ShardCache) -> None:
    store.faults[BUCKET] = ["denied"]
    folder = opened(cache)
    assert folder.read(INSIDE) == SAMPLES[INSIDE] and not store.faults[BUCKET]
    cache.drop(folder.blobs[2])
    store.gets.clear()
    store.faults[SHARD] = ["denied"]
    with pytest.raises(DataError, match=f"{SHARD}' cannot be reached .*check the credentials"):
        folder.read(INSIDE)
    assert store.gets[SHARD] == 1, "waiting would not mend it"


def test_shards_that_are_not_those_of_the_manifest(
    store: Store, built: Path, cache: ShardCache, tmp_path: Path
) -> None:
    """Replaced while a run reads the folder: once more, then the end."""
    content = (built / SHARD).read_bytes()
    folder = opened(cache)
    try:
        put(SHARD, content[:-700] + b"#" + content[-699:])
        store.gets.clear()
        with pytest.raises(DataError, match=f"{SHARD}' is not the shard that its manifest names"):
            folder.read(INSIDE)
        assert store.gets[SHARD] == 2
        (problem,) = verify_folder(RemoteFolder(URL))
        assert SHARD in problem and "shards push" in problem
        put(SHARD, content[:-512])
        with pytest.raises(DataError, match=f"{SHARD} has 19968 bytes instead of 20480"):
            opened(cache)
        with pytest.raises(DataError, match="19968 bytes came instead of 20480"):
            folder.read(INSIDE)
    finally:
        put(SHARD, content)
    assert folder.read(INSIDE) == SAMPLES[INSIDE]
    push_folder(built, RemoteFolder(f"s3://{BUCKET}/lost"), False, lambda done, total: None)
    lost = RemoteFolder(f"s3://{BUCKET}/lost")
    lost.remove(SHARD)
    put("more.tar", b"", "lost")
    with pytest.raises(DataError, match=f"{SHARD} is missing .*more.tar is not in the manifest"):
        ShardFolder.open(lost, cache=cache)
    with pytest.raises(DataError, match="'s3://.*none' has no readable manifest.json"):
        ShardFolder.open(f"s3://{BUCKET}/none", cache=cache)


# --- the cache ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_what_is_needed_stays(
    store: Store, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * 20480)
    folder = opened(cache)
    (cache.folder / "notes.txt").write_text("not ours" * 10000)
    blobs = folder.blobs
    for number in (0, 1, 2):
        folder.read(number * PER_SHARD)
    for age_s, number in enumerate((0, 1, 2)):
        os.utime(cache.folder / f"{blobs[number].sha256}.tar", (10**9 - age_s, 10**9))
    assert cache.held_bytes == 3 * 20480, "the index went first"
    cache.needed = frozenset({blobs[2].sha256})
    folder.read(3 * PER_SHARD)
    assert [cache.holds(blob.sha256) for blob in blobs] == [True, False, True, True, False]
    cache.needed = frozenset()
    folder.read(0)  # used again: its time is noted
    folder.read(4 * PER_SHARD)
    assert [cache.holds(blob.sha256) for blob in blobs] == [True, False, False, True, True]
    assert (cache.folder / "notes.txt").exists(), "what is not ours is left alone"
    with pytest.raises(DataError, match="more than the cache of .*; raise data.cache_gib"):
        ShardCache(tmp_path / "tiny", 20479).open(blobs[0])


def test_a_damaged_copy_is_fetched_anew(store: Store, cache: ShardCache) -> None:
    folder = opened(cache)
    folder.read(INSIDE)
    path = cache.folder / f"{folder.blobs[2].sha256}.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"question", b"Question"))
    assert folder.read(INSIDE) == SAMPLES[INSIDE] and path.read_bytes() == content
    path.write_bytes(content[:-1])
    assert folder.read(INSIDE) == SAMPLES[INSIDE] and path.read_bytes() == content
    assert store.gets[SHARD] == 3


def test_what_a_killed_process_left_is_taken_away(store: Store, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * 20480)
    folder = opened(cache)
    for sha256 in ("a" * 64, folder.blobs[0].sha256):
        (cache.folder / f"{sha256}.20480.part").write_bytes(b"half")
    assert folder.read(0) == SAMPLES[0]
    assert folder.read(PER_SHARD) == SAMPLES[PER_SHARD]
    assert held(cache) == {f"{blob.sha256}.tar" for blob in folder.blobs[:2]}


def test_a_cache_that_cannot_be_written_says_so(
    store: Store, tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = opened(ShardCache(tmp_path / "file" / "cache", 2**20))
    with pytest.raises(DataError, match="cannot keep .*Not a directory; make room") as caught:
        folder.read(0)
    assert "data.cache_dir" in caught.value.remedy
    # /dev/full is a disk without room.
    cache = ShardCache(tmp_path / "full", 2**20)
    blob = opened(cache).blobs[0]

    def no_room(self: RemoteFolder, name: str, target: Path, num_bytes: int) -> None:
        self._try(name, lambda: Path("/dev/full").write_bytes(b"x"))

    monkeypatch.setattr(RemoteFolder, "fetch", no_room)
    with pytest.raises(DataError, match="No space left on device; make room"):
        cache.open(blob)
    assert not [name for name in held(cache) if name.endswith("part")]


FETCH = """
import os, sys
from pathlib import Path
from mmtrain.data.cache import ShardCache
from mmtrain.data.shards import ShardFolder
cache = ShardCache(Path(sys.argv[2]), 2**20)
folder = ShardFolder.open(sys.argv[1], cache=cache)
print("ready", flush=True)
sys.stdin.readline()
for number in range(0, len(folder), 4):
    print(folder.read(number).id)
"""


def test_processes_and_threads_fetch_a_shard_once(store: Store, cache: ShardCache) -> None:
    arguments = [sys.executable, "-c", FETCH, URL, str(cache.folder)]
    processes = [
        subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    folder = opened(cache)
    found: list[str] = []

    def read() -> None:
        found.extend(folder.read(number).id for number in range(0, NUM_SAMPLES, PER_SHARD))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    outputs = [process.communicate("\n", timeout=60)[0] for process in processes]
    for thread in threads:
        thread.join()
    expected = [SAMPLES[number].id for number in range(0, NUM_SAMPLES, PER_SHARD)]
    assert [output.split() for output in outputs] == [expected] * 2
    assert sorted(found) == sorted(expected * 4)
    assert {store.gets[shard.name] for shard in folder.manifest.shards} == {1}
    assert len(held(cache)) == 6 and not [name for name in held(cache) if "part" in name]


def test_a_web_server_is_read_too(built: Path, cache: ShardCache) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(built))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        folder = ShardFolder.open(f"http://127.0.0.1:{web.server_port}", cache=cache)
        assert [folder.read(i) for i in range(NUM_SAMPLES)] == SAMPLES
        web.shutdown()


def test_a_store_without_its_library_is_told(cache: ShardCache) -> None:
    blob = Blob(RemoteFolder("dropbox://x/y"), "a.tar", 1, "0" * 64)
    with pytest.raises(MmtrainError, match="'dropbox://x/y': fsspec cannot open it .*install"):
        cache.open(blob)
