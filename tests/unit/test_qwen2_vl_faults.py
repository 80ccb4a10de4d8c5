"""Damaged or mismatched folders of Qwen2-VL, 2.5 and 3: every fault is one named error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmtrain.errors import CheckpointError
from mmtrain.models import weights
from tests.unit.qwen2_vl_material import (
    Tensors,
    copy_with,
    edit_json,
    load,
    stored_tensors,
    write_plain,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen2_vl")
    return {name: write_plain(root / name, name) for name in ("tiny", "tiny-2.5")}


# --- faults: (what is done to a copy of the folder, what the error must name) ---------------------


def _edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _wrong_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llava")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_cut(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])


def _config_of_other_kind(folder: Path) -> None:
    edit_json(folder / "config.json", text_config={"hidden_size": "wide"})


def _config_does_not_add_up(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 2]
    (folder / "config.json").write_text(json.dumps(config))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _missing_keys(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.2.mlp.up_proj" in name]:
            del tensors[name]

    _edit_weights(folder, change)


def _surplus_keys(folder: Path) -> None:
    surplus = {"model.layers.9.mlp.up_proj.weight": torch.ones(3, 3)}
    _edit_weights(folder, lambda tensors: tensors.update(surplus))


def _wrong_shape(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("merger.mlp.2.weight"))
        tensors[name] = tensors[name][:, :-1].contiguous()

    _edit_weights(folder, change)


def _twice(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()

    _edit_weights(folder, change)


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models.families.qwen2_vl.tiny_twin import train_tokenizer

    train_tokenizer(["another text altogether"], None).save_pretrained(folder)


def _larger_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more-{number}>" for number in range(64)])
    tokenizer.save_pretrained(folder)


def _tokenizer_without_turns(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|im_start|>", "<|start|>")
        (folder / name).write_text(text)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _no_image_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _other_patches(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", patch_size=14)


def _no_budget(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", size={"shortest_edge": 336})


FAULTS = {
    "wrong family": (_wrong_family, "is a 'llava' checkpoint, not 'qwen2_vl' or 'qwen2_5_vl' or"),
    "no config": (_no_config, "no config.json"),
    "config cut": (_config_cut, "config.json: not readable"),
    "config of another kind": (_config_of_other_kind, "not a configuration of 'qwen2_vl'"),
    "config does not add up": (_config_does_not_add_up, "16 channels per head"),
    "no weights": (_no_weights, "no weights there"),
    "missing keys": (_missing_keys, "1 missing: model.language_model.layers.2.mlp.up_proj.weight"),
    "surplus keys": (_surplus_keys, "1 surplus: model.language_model.layers.9.mlp.up_proj.weight"),
    "wrong shape": (_wrong_shape, r"merger.mlp.2.weight is \[64, 255\] in the file, \[64, 256\]"),
    "stored twice": (_twice, "model.language_model.norm.weight is stored twice"),
    "cut short": (_cut_short, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, r"the tokenizer gives <\|image_pad\|> the id"),
    "larger tokenizer": (_larger_tokenizer, "401 tokens, config.json 384 embeddings"),
    "no turns": (_tokenizer_without_turns, r"the tokenizer has no <\|im_start\|>"),
    "no tokenizer": (_no_tokenizer, "tokenizer"),
    "no image processor": (_no_image_processor, "no usable tokenizer and image processor"),
    "other patches": (_other_patches, "patch_size 14, config.json says 4"),
    "no budget": (_no_budget, "no range of pixels"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["tiny"], damaged)
    harm, named = FAULTS[fault]
    harm(damaged)
    written: list[Any] = []
    monkeypatch.setattr(weights, "write_parameter", lambda *given: written.append(given))
    with pytest.raises(CheckpointError, match=named) as caught:
        load(damaged)
    assert str(damaged) in str(caught.value) and caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not written


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="/nowhere/qwen is no folder"):
        load(Path("/nowhere/qwen"))


def test_weights_of_another_generation_are_an_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers itself would only warn of what it leaves out and makes up."""
    tensors = stored_tensors(folders["tiny-2.5"])
    with pytest.raises(CheckpointError, match="missing.*surplus"):
        load(copy_with(folders["tiny"], tmp_path / "copy", tensors))
