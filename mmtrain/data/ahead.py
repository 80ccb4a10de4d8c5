"""Remote shards fetched before training reads them, in the order in which it will."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmtrain.data.cache import Blob, ShardCache
from mmtrain.data.mixture import Mixture
from mmtrain.data.plan import Planner
from mmtrain.data.source import Source
from mmtrain.errors import MmtrainError

log = logging.getLogger("mmtrain")

_THREADS = 4  # stores serve one connection slower than several
LOCAL = -1  # in the place of a blob's number


@dataclass(eq=False)
class Fetcher:
    """Threads that bring files into the cache, the last list that was asked for."""

    cache: ShardCache
    _pending: deque[Blob] = field(default_factory=deque)
    _alive: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def want(self, blobs: Iterable[Blob]) -> None:
        """These from now on, one after another, in the place of those not yet begun."""
        with self._lock:
            self._pending = deque(blobs)
            missing = min(_THREADS, len(self._pending)) - self._alive
            for _ in range(missing):
                self._alive += 1
                # A process that ends does not wait for them.
                threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._alive -= 1
                    return
                blob = self._pending.popleft()
            try:
                os.close(self.cache.open(blob))
            except MmtrainError as fault:
                # Who needs it tries again, and ends the run by name.
                log.warning("not fetched ahead: %s", fault)


def fetch_all(blobs: Sequence[Blob], cache: ShardCache) -> None:
    """In the background, in the order of the samples: of data that fit, and are all read."""
    if sum(blob.num_bytes for blob in blobs) <= cache.max_bytes:
        Fetcher(cache).want(blobs)


@dataclass(eq=False)
class Ahead:
    """What a planner's coming steps need: the window of the present step, and the one after it."""

    planner: Planner
    mixture: Mixture
    fetcher: Fetcher
    blobs: Sequence[Blob]
    blob_of: np.ndarray  # of every sample; LOCAL for one that lies on this machine
    always: Sequence[Blob]  # needed besides, from validation to validation
    _reached: tuple[int, int] = (-1, -1)  # epoch and window

    @classmethod
    def of(
        cls,
        planner: Planner,
        mixture: Mixture,
        train: Sequence[Source],
        val: Sequence[Source],
        cache: ShardCache,
    ) -> Ahead | None:
        """What fetches for a run; None where all its shards lie on this machine."""
        blobs: list[Blob] = []
        blob_of = []
        for source in train:
            shard_of = source.share.shard_of
            own = source.shards.blobs
            blob_of.append(len(blobs) + shard_of if own else np.full(len(shard_of), LOCAL))
            blobs += own
        always = [blob for source in val for blob in source.blobs]
        if not blobs and not always:
            return None
        return cls(planner, mixture, Fetcher(cache), blobs, np.concatenate(blob_of), always)

    def reach(self, position: int, stop: int) -> None:
        """Every step before `position` is done, on all ranks; steps from `stop` on are not taken.

        Called at every step; there is something to do where a window begins.
        """
        epoch, step = divmod(position, self.planner.steps_per_epoch)
        reached = epoch, int(self._windows(epoch)[step * self.planner.layout.global_batch])
        if reached == self._reached:
            return
        self._reached = reached
        coming = [self.blobs[number] for number in self._coming(position, stop)]
        needed = {blob.sha256: blob for blob in (*coming, *self.always)}
        self.fetcher.cache.needed = frozenset(needed)
        self.fetcher.want(needed.values())

    def stop(self) -> None:
        """Nothing more is needed."""
        self.fetcher.want(())

    def _windows(self, epoch: int) -> np.ndarray:
        return self.mixture.windows_in_order(self.planner.seed, epoch)

    def _coming(self, position: int, stop: int) -> list[int]:
        """Numbers of blobs, in the order in which they are needed first."""
        per_epoch, batch = self.planner.steps_per_epoch, self.planner.layout.global_batch
        epoch, step = divmod(position, per_epoch)
        windows, start = self._windows(epoch), step * batch
        this, last = int(windows[start]), int(windows[-1])
        samples = self._up_to(this + 1, epoch, stop)[start:]
        if this == last:
            samples = np.concatenate([samples, self._up_to(0, epoch + 1, stop)])
        found, first = np.unique(self.blob_of[samples], return_index=True)
        return [int(number) for number in found[np.argsort(first)] if number != LOCAL]

    def _up_to(self, window: int, epoch: int, stop: int) -> np.ndarray:
        """The samples of an epoch to the end of a window, or of what is trained."""
        steps = max(0, stop - epoch * self.planner.steps_per_epoch)
        end = int(np.searchsorted(self._windows(epoch), window, side="right"))
        order = self.mixture.order(self.planner.seed, epoch)
        return order[: min(end, steps * self.planner.layout.global_batch)]
