"""Shards looked through by processes, while others are still being written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from data_shards.look import Looked, OnByte, look_through
from mmtrain.errors import DataError


class Lookers:
    """What shards hold, in the order in which they were begun."""

    def __init__(self, task: str, workers: int, first: int = 0) -> None:
        self._task, self._workers, self._begun = task, workers, first
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: deque[Future[Looked]] = deque()

    def __enter__(self) -> Lookers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self, path: Path) -> None:
        """Look through the next shard, in another process where there are several."""
        if self._workers == 1:
            self.look(path)
            return
        self._pool = self._pool or _pool(self._workers)
        with _alive():
            future = self._pool.submit(look_through, path, self._begun, self._task, 1)
        self._ahead.append(future)
        self._begun += 1

    def look(self, path: Path, progress: OnByte = lambda end: None) -> None:
        """Look through the next shard here and now, on all cores: for the last, or a single one."""
        future: Future[Looked] = Future()
        future.set_result(look_through(path, self._begun, self._task, self._workers, progress))
        self._ahead.append(future)
        self._begun += 1

    def finished(self, wait: bool = False) -> Iterator[Looked]:
        """The next shards that were looked through, as far as they are; with `wait`, all."""
        while self._ahead and (wait or self._ahead[0].done()):
            with _alive():
                looked = self._ahead.popleft().result()
            yield looked


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as fault:
        raise DataError(
            "a process that looks through shards was ended from outside, perhaps for its memory;",
            "give fewer --workers.",
        ) from fault


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked from a server that knows no threads, no torch and no samples of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([look_through.__module__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """A worker leaves Ctrl-C to its builder, and ends with it, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_builder, daemon=True).start()


def _end_with_builder() -> None:
    builder = multiprocessing.parent_process()
    assert builder is not None, "only workers come here"
    builder.join()
    os._exit(1)
