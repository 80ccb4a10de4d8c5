"""Damaged or mismatched folders of Qwen2-VL, 2.5 and 3: every fault is one named error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models import building
from tests.unit.folder_faults import (
    Faults,
    Tensors,
    assert_refused,
    config_cut,
    copied,
    edit_weights,
    stored_tensors,
    weights_cut_short,
    with_config,
    with_json,
    with_more_tokens,
    with_tensors,
    without_files,
    without_tensors,
)
from tests.unit.qwen2_vl_material import load, write_plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen2_vl")
    return {name: write_plain(root / name, name) for name in ("tiny", "tiny-2.5")}


# --- faults ---------------------------------------------------------------------------------------


def _twice(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()

    edit_weights(folder, change)


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models.families.qwen2_vl.tiny_model import train_tokenizer

    train_tokenizer(["another text altogether"], None).save_pretrained(folder)


def _tokenizer_without_turns(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|im_start|>", "<|start|>")
        (folder / name).write_text(text)


FAULTS: Faults = {
    "wrong family": (
        with_config(model_type="llava"),
        "is a 'llava' checkpoint, not 'qwen2_vl' or 'qwen2_5_vl' or",
    ),
    "no config": (without_files("config.json"), "no config.json"),
    "config cut": (config_cut, "config.json: not readable"),
    "config of another kind": (
        with_config(text_config={"hidden_size": "wide"}),
        "not a configuration of 'qwen2_vl'",
    ),
    "config does not add up": (
        with_config("text_config", "rope_parameters", mrope_section=[2, 2, 2]),
        "16 channels per head",
    ),
    "no weights": (without_files("model.safetensors"), "no weights there"),
    "missing keys": (
        without_tensors("model.layers.2.mlp.up_proj.weight"),
        "1 missing: model.language_model.layers.2.mlp.up_proj.weight",
    ),
    "surplus keys": (
        with_tensors({"model.layers.9.mlp.up_proj.weight": torch.ones(3, 3)}),
        "1 surplus: model.language_model.layers.9.mlp.up_proj.weight",
    ),
    "wrong shape": (
        with_tensors({"visual.merger.mlp.2.weight": torch.ones(64, 255)}),
        r"merger.mlp.2.weight is \[64, 255\] in the file, \[64, 256\]",
    ),
    "stored twice": (_twice, "model.language_model.norm.weight is stored twice"),
    "cut short": (weights_cut_short, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, r"the tokenizer gives <\|image_pad\|> the id"),
    "larger tokenizer": (with_more_tokens(64), "401 tokens, config.json 384 embeddings"),
    "no turns": (_tokenizer_without_turns, r"the tokenizer has no <\|im_start\|>"),
    "no tokenizer": (without_files("tokenizer*"), "tokenizer"),
    "no image processor": (
        without_files("preprocessor_config.json"),
        "no usable tokenizer and image processor",
    ),
    "other patches": (
        with_json("preprocessor_config.json", patch_size=14),
        "patch_size 14, config.json says 4",
    ),
    "no budget": (
        with_json("preprocessor_config.json", size={"shortest_edge": 336}),
        "no range of pixels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    harm, named = FAULTS[fault]
    assert_refused(folders["tiny"], tmp_path / "damaged", harm, named, load, monkeypatch)


def test_a_wrong_processor_is_found_before_the_model_is_built(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr(building, "build_empty", lambda *given: built.append(given))
    folder = copied(folders["tiny"], tmp_path / "copy")
    _other_tokenizer(folder)
    with pytest.raises(CheckpointError, match="the tokenizer gives"):
        load(folder)
    assert not built


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="/nowhere/qwen is no folder"):
        load(Path("/nowhere/qwen"))


def test_weights_of_another_generation_are_an_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers itself would only warn of what it leaves out and makes up."""
    tensors = stored_tensors(folders["tiny-2.5"])
    with pytest.raises(CheckpointError, match="missing.*surplus"):
        load(copied(folders["tiny"], tmp_path / "copy", tensors))
