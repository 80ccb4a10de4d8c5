"""Windows of steps: the benchmark opens one peer at a time, the others stand still.

Every peer is a process of its own, so that no library's global state (thread pools, determinism,
patched modules) reaches another. Both sides speak JSON lines over a pair of pipes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Gate:
    """The peer's side: stops its training loop between windows and times each window."""

    def __init__(self, read_fd: int, write_fd: int, device: str) -> None:
        self._commands = os.fdopen(read_fd, "r", encoding="utf-8")
        self._answers = os.fdopen(write_fd, "w", encoding="utf-8")
        self._device = device
        self._synchronize = synchronizer(device)
        self._losses: list[Any] = []
        self._left = 0
        self._started_s = 0.0

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Tell the benchmark that training can begin, and what it should know."""
        self._send(facts)

    def open(self) -> bool:
        """Wait for the next window and start its clock; False when there is none."""
        line = self._commands.readline()
        self._left = json.loads(line)["steps"] if line else 0
        self._started_s = time.perf_counter()
        return self._left > 0

    def step_done(self, loss: Any) -> bool:
        """Count a step, its loss a number or a tensor; False when no further step is wanted."""
        self._losses.append(loss)
        self._left -= 1
        if self._left > 0:
            return True
        self._synchronize()
        seconds = time.perf_counter() - self._started_s
        losses = [float(value) for value in self._losses]
        self._losses.clear()
        self._send({"seconds": seconds, "losses": losses, "peak_gib": peak_gib(self._device)})
        return self.open()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


class Peer:
    """The benchmark's side: one training process, advanced window by window."""

    def __init__(self, label: str, module: str, job: Mapping[str, Any], folder: Path) -> None:
        self.label = label
        self.log = folder / f"{label}.log"
        job_file = folder / f"{label}.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        child_reads, parent_writes = os.pipe()
        parent_reads, child_writes = os.pipe()
        threads = str(job["threads"])
        own_environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if job["device"] == "cpu":
            own_environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", module, str(job_file), str(child_reads), str(child_writes)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=(child_reads, child_writes),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | own_environment,
            )
        os.close(child_reads)
        os.close(child_writes)
        self._commands = os.fdopen(parent_writes, "w", encoding="utf-8")
        self._answers = os.fdopen(parent_reads, "r", encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        """What the peer says when it is ready to train."""
        return self._receive()

    def window(self, steps: int) -> tuple[float, list[float], float]:
        """Advance by some steps: seconds, the loss of each step, and the peak of memory so far."""
        self._commands.write(json.dumps({"steps": steps}) + "\n")
        self._commands.flush()
        answer = self._receive()
        return answer["seconds"], answer["losses"], answer["peak_gib"]

    def close(self) -> None:
        """Let the peer end; a peer that does not is stopped."""
        self._commands.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-30:])
            raise RuntimeError(f"peer {self.label} stopped; the end of its log:\n{tail}")
        return dict(json.loads(line))


def read_job() -> tuple[dict[str, Any], int, int]:
    """A peer's job and its two pipe ends, from its command line."""
    _, job_file, read_fd, write_fd = sys.argv
    return json.loads(Path(job_file).read_text(encoding="utf-8")), int(read_fd), int(write_fd)


def synchronizer(device: str) -> Callable[[], None]:
    """Waits until the device has done all it was given; nothing to wait for on a CPU."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def peak_gib(device: str) -> float:
    """The most memory that this process ever held: a card's, or what was resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage's: that begins with what the parent held.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def batch_digest(tensors: Mapping[str, Any]) -> str:
    """What identifies a batch: its token ids, whatever it is padded with, and image values."""
    import hashlib

    digest = hashlib.sha256()
    mask = tensors["attention_mask"]
    parts = [tensors["input_ids"] * mask, mask]
    # Without any image one side has no pixels, the other a blank image that nothing reads.
    if (pixels := tensors.get("pixel_values")) is not None and bool(pixels.any()):
        parts.append(pixels)
    for values in parts:
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
