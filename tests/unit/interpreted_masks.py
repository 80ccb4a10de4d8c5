"""Masks of the kernel in Triton's interpreter, and of the plain operators: where they differ.

A process of its own, with TRITON_INTERPRET=1: Triton reads it when a kernel is defined.
"""

from __future__ import annotations

import json

import torch

from mmtrain.models.dropout_kernel import masked
from mmtrain.models.dropout_mask import MaskKey, plain_mask

# Numbers whose sign bits and both words matter.
ROW_KEYS = (2**63 - 5, 2**31 + 7)
MODULE_KEYS = (2**62 + 2**31 + 3, 16, 1)
STEP_KEY = -77
WIDTHS = (1, 33, 2500)
LAYOUTS = ("packed", "padded", "attention")
# With each module's key, one after the other.
PROBABILITIES = {
    "float32": (0.05, 0.999, 2**-31),
    # The interpreter cuts bf16's digits off where a GPU rounds: here there are none to cut off.
    "bfloat16": (0.2, 0.75, 0.5),
}


def shape_of(layout: str, width: int) -> tuple[int, ...]:
    """Two rows' activations, or two tokens'."""
    middle = {"packed": (), "padded": (3,), "attention": (2, 2)}[layout]
    return (len(ROW_KEYS), *middle, width)


def num_differing(layout: str, dtype: str) -> int:
    """Elements that kernel and operators do not agree about, over widths, keys, probabilities."""
    rows, step = torch.tensor(ROW_KEYS), torch.tensor(STEP_KEY, dtype=torch.int32)
    index = torch.tensor([9, 2**20]) if layout == "packed" else None
    count = 0
    for width in WIDTHS:
        whole = torch.arange(1, 1 + torch.Size(shape_of(layout, width)).numel()) % 13 - 6.0
        x = whole.view(shape_of(layout, width)).to(getattr(torch, dtype))
        for module, probability in zip(MODULE_KEYS, PROBABILITIES[dtype], strict=True):
            key = MaskKey(rows, index, step, None, module, probability)
            wanted, in_place = plain_mask(x, key)(x), x.clone()
            found = masked(key, x) if module == 1 else masked(key, in_place, out=in_place)
            count += int((found != wanted).sum())
    return count


if __name__ == "__main__":
    found = {
        f"{one} {dtype}": num_differing(one, dtype) for one in LAYOUTS for dtype in PROBABILITIES
    }
    print(json.dumps(found))
