"""Writing safetensors one tensor at a time: the memory of one tensor, whatever the file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_NAMES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}


class TensorFileWriter:
    """A safetensors file whose names and shapes are known before its data."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        type_name, item_bytes = _NAMES[dtype]
        self._dtype = dtype
        self._expected = list(shapes)
        self._written = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, shape in shapes.items():
            size = item_bytes * int(torch.Size(shape).numel())
            header[name] = {
                "dtype": type_name,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, in the order of `shapes`."""
        assert name == self._expected[self._written], (name, self._expected[self._written])
        data = tensor.detach().to("cpu", self._dtype).contiguous().view(torch.uint8)
        self._file.write(data.numpy().tobytes() if data.numel() else b"")
        self._written += 1

    def close(self) -> None:
        """Flush to the disk itself."""
        assert self._written == len(self._expected), "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
