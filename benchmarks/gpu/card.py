"""The card, asked of its driver: the asking process must not open a context on it."""

from __future__ import annotations

import subprocess

# Dense bf16, by the vendors' data sheets.
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0}


def _ask(field: str) -> str:
    asked = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()[0].strip()


def card_name(device: str) -> str:
    """What the driver calls it."""
    return "cpu" if device == "cpu" else _ask("name")


def memory_gib() -> float:
    """All of its memory."""
    return float(_ask("memory.total")) / 1024


def peak_tflops(card: str) -> float | None:
    """Its data-sheet rate, where that is known."""
    return next((rate for name, rate in _PEAK_TFLOPS.items() if name in card), None)
