"""SIGTERM ends a rank in order, wherever its main thread is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.errors import Terminated
from mmtrain.training.termination import ending_in_order
from tests import tiny

# A mutex locked twice: the main thread waits in C for ever, as inside a collective.
STUCK = """
import ctypes
from mmtrain.training import termination

termination.STUCK_AFTER_S = 0.2
mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
with termination.ending_in_order(lambda: print("last resort", flush=True)):
    libc.pthread_mutex_lock(mutex)
    print("waiting", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def test_the_main_thread_is_told_once_and_signals_are_as_before_afterwards() -> None:
    def never() -> None:
        raise AssertionError("the main thread was not stuck")

    before = signal.getsignal(signal.SIGTERM)
    reached = []
    with ending_in_order(never):
        with pytest.raises(Terminated, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("after the first")
        os.kill(os.getpid(), signal.SIGTERM)  # the ending itself is not interrupted
        reached.append("after the second")
    assert reached == ["after the second"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_main_thread_stuck_in_c_gets_a_last_resort() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, cwd=tiny.REPOSITORY
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    state = Path(f"/proc/{process.pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "last resort\n"
    assert process.returncode == 143
