"""Checkpoint folders copied, changed and harmed, and what every family must say of a harmed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmtrain.errors import CheckpointError
from mmtrain.models import weights

Tensors = dict[str, torch.Tensor]
Harm = Callable[[Path], object]  # done to a copy; those named with… and without… are made to order
# What is done to a copy of the folder, and what the error must name.
Faults = dict[str, tuple[Harm, str]]
WEIGHTS = "model.safetensors"


def stored_tensors(folder: Path) -> Tensors:
    """The tensors of a folder with one weight file, under their stored names."""
    with safe_open(folder / WEIGHTS, "pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """The one weight file of a folder."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def copied(folder: Path, target: Path, tensors: Tensors | None = None) -> Path:
    """A copy that may be changed, with other weights if they are given."""
    shutil.copytree(folder, target)
    if tensors is not None:
        write_tensors(target, tensors)
    return target


def edit_json(path: Path, *parts: str, **values: Any) -> None:
    """Change values of a file, or of the part of it that the keys lead to; None removes one."""
    stored = json.loads(path.read_text())
    part = stored
    for key in parts:
        part = part[key]
    part.update(values)
    for key in [key for key, value in values.items() if value is None]:
        del part[key]
    path.write_text(json.dumps(stored))


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the stored tensors in place."""
    tensors = stored_tensors(folder)
    change(tensors)
    write_tensors(folder, tensors)


def config_is_no_object(folder: Path) -> None:
    """JSON, but of another kind."""
    (folder / "config.json").write_text("[1, 2]")


def config_cut(folder: Path) -> None:
    """The configuration ends too early to be JSON."""
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])


def weights_cut_short(folder: Path) -> None:
    """The weight file lacks its end."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def weights_header_damaged(folder: Path) -> None:
    """One byte of the weight file's table of contents is another."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[20] ^= 0xFF
    (folder / WEIGHTS).write_bytes(data)


def without_files(*patterns: str) -> Harm:
    """The files that match are gone; each pattern must match some."""

    def harm(folder: Path) -> None:
        for pattern in patterns:
            paths = list(folder.glob(pattern))
            assert paths, f"{folder} has no {pattern} to take away"
            for path in paths:
                path.unlink()

    return harm


def with_json(file: str, *parts: str, **values: Any) -> Harm:
    """Values of one file are others, as `edit_json` takes them."""
    return lambda folder: edit_json(folder / file, *parts, **values)


def with_config(*parts: str, **values: Any) -> Harm:
    """Values of the configuration are others, as `edit_json` takes them."""
    return with_json("config.json", *parts, **values)


def without_tensors(*names: str) -> Harm:
    """The stored tensors of these names are gone."""
    return lambda folder: edit_weights(folder, lambda tensors: [tensors.pop(n) for n in names])


def with_tensors(more: Mapping[str, torch.Tensor]) -> Harm:
    """These tensors are stored too, or instead of those of the same names."""
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update(more))


def with_more_tokens(count: int, part: str = ".") -> Harm:
    """The tokenizer in the folder, or in a part of it, knows more tokens."""

    def harm(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / part)
        tokenizer.add_tokens([f"<more-{number}>" for number in range(count)])
        tokenizer.save_pretrained(folder / part)

    return harm


def assert_refused(
    healthy: Path,
    damaged: Path,
    harm: Harm,
    named: str,
    load: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A harmed copy is one error on one line, with folder and remedy; no weight is written."""
    harm(copied(healthy, damaged))
    written: list[Any] = []
    monkeypatch.setattr(weights, "set_parameter", lambda *given: written.append(given))
    with pytest.raises(CheckpointError, match=named) as caught:
        load(damaged)
    assert str(damaged) in str(caught.value) and caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not written
