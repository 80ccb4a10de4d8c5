"""Weight files that are none: one error each, whatever the library's reader raises."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models.weights import check_files, has_weights, open_weights, read_json, weight_files
from tests.fuzz import examples


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


GARBAGE = {
    "empty": b"",
    "text": b"hello world, no tensors at all",  # torch's reader ends in a KeyError
    "a page": b"<html>" * 50,
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "no JSON": _with_header(b"{"),
    "no UTF-8": _with_header(b"\xff\xfe"),
    "a list": _with_header(b"[]"),
    "no such type": _with_header(b'{"a":{"dtype":"XX","shape":[0],"data_offsets":[0,0]}}'),
    "more than all": _with_header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "cut archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_one_error(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GARBAGE[kind])
    assert has_weights(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}: damaged, or holds|{name}: damaged or cut"):
        check_files(tmp_path)


def test_a_bin_file_with_other_bytes_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(200)}, path)
    data, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(examples(150)):
        changed = bytearray(data)
        for _ in range(3):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(
            changed[: chance.randrange(len(changed))] if chance.random() < 0.3 else changed
        )
        try:
            with open_weights(path) as reader:
                assert all(reader.get_tensor(name) is not None for name in reader.keys())
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no weights there"):
        weight_files(tmp_path)
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight files are missing: model.safetensors"):
        check_files(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read_json(tmp_path / "config.json")
