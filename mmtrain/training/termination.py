"""SIGTERM: a scheduler, a launcher or a person wants this rank to end now, in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmtrain.errors import Terminated

# A main thread that has not come back to Python by then waits for a rank that is gone. The
# launcher kills after 10 s.
STUCK_AFTER_S = 3.0


@contextmanager
def ending_in_order(last_resort: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread.

    Inside a collective no Python runs there: then a thread does the last resort and ends the
    process. In another thread than the main one (Ray's workers) signals are left to the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = threading.Event()

    def stop(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise Terminated

    def watch() -> None:
        # Written to by the interpreter's own handler, wherever the main thread is.
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not raised.wait(STUCK_AFTER_S):
                raised.set()
                last_resort()
                os._exit(128 + signal.SIGTERM)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer)
    handler_before = signal.signal(signal.SIGTERM, stop)
    watcher = threading.Thread(target=watch, name="mmtrain-termination", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler_before)
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)
        watcher.join()
        os.close(reader)
