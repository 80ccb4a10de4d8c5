"""Whether this CPU computes in bf16 or emulates it: measured, for no flag says it everywhere."""

from __future__ import annotations

import time

# Where bf16 has instructions a product takes about fp32's time or less, emulated 10 to 30 times it.
EMULATED_RATIO = 4.0
NUM_TRIES = 3


def emulation() -> str:
    """How much longer a product of matrices takes than in fp32; empty where bf16 has hardware."""
    import torch

    ratio = product_s(torch.bfloat16) / product_s(torch.float32)
    if ratio < EMULATED_RATIO:
        return ""
    return f"this CPU emulates it, a product of matrices takes {ratio:.0f} times fp32's time"


def product_s(dtype: object, size: int = 512) -> float:
    """Seconds of one product, the fastest of a few."""
    import torch

    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(NUM_TRIES):
        began_s = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)
