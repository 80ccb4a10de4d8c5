"""safetensors one tensor at a time: the memory of one tensor, whatever a file holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mmtrain.errors import CheckpointError

Shapes = Mapping[str, torch.Size]


class Place(NamedTuple):
    """Where a tensor is stored: its file, its name there, its shape."""

    path: Path
    key: str
    shape: torch.Size


Places = Mapping[str, Place]
_NAMES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}


class TensorFileWriter:
    """A safetensors file whose names and shapes are known before its data."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        type_name, item_bytes = _NAMES[dtype]
        self._dtype = dtype
        self._expected = list(shapes)
        self._written = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """The shapes of a file's tensors; no tensor is read."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as reader:
            return {name: torch.Size(reader.get_slice(name).get_shape()) for name in reader.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}).", "Copy or export it again."
        ) from error
