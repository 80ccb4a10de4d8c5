"""LLaVA folders as people have them: every layout loads, every fault is one named error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmtrain.errors import CheckpointError
from mmtrain.models import weights
from mmtrain.models.interface import ModelOptions
from tests import tiny
from tests.unit.llava_material import FAMILY, load, stored_tensors, write_lively

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Tensors:
    """What transformers itself loads from the folder."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def assert_loads(folder: Path, wanted: Tensors) -> None:
    """Every parameter is bit-equal to transformers' own."""
    found = dict(load(folder).model.named_parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_file(folder: Path, wanted: Tensors) -> None:
    assert_loads(folder, wanted)


def test_sharded_with_an_index(folder: Path, wanted: Tensors, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_loads(tmp_path, wanted)


# Key layouts by age, each told from the names of today's module tree.
LAYOUTS = {
    "oldest": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
    "middle": (
        (r"^model\.vision_tower\.", "model.vision_tower.vision_model."),
        (r"^lm_head\.", "lm_head."),
    ),
    "today": (),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout(folder: Path, wanted: Tensors, tmp_path: Path, layout: str) -> None:
    tensors = {}
    for name, tensor in wanted.items():
        for pattern, replacement in LAYOUTS[layout]:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.detach().clone()
    # Buffers that older versions stored.
    prefix = "vision_tower.vision_model." if layout == "oldest" else "model.vision_tower."
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(17)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    replaced = copy_with(folder, tmp_path / layout, tensors)
    assert_loads(replaced, wanted)


def test_bf16_loads_the_rounded_weights(folder: Path, wanted: Tensors) -> None:
    options = ModelOptions(checkpoint=str(folder), preset=None, dtype="bf16")
    model = FAMILY.load(options, None).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wanted[name].to(torch.bfloat16)), name
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


def copy_with(folder: Path, target: Path, tensors: Tensors) -> Path:
    """The folder with other weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- faults: (what is done to a copy of the folder, what the error must name) ---------------------


def _edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _wrong_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="qwen2_vl")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def _config_cut(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:100])


def _missing_shard(folder: Path) -> None:
    index = {name: "model-00001-of-00002.safetensors" for name in stored_tensors(folder)}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    last = sorted(index)[-1]
    index[last] = "model-00002-of-00002.safetensors"
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _missing_keys(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.2.mlp.up_proj" in name]:
            del tensors[name]

    _edit_weights(folder, change)


def _surplus_keys(folder: Path) -> None:
    surplus = {"language_model.model.layers.9.mlp.up_proj.weight": torch.ones(3, 3)}
    _edit_weights(folder, lambda tensors: tensors.update(surplus))


def _wrong_shape(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = "multi_modal_projector.linear_1.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()

    _edit_weights(folder, change)


def _twice(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()

    _edit_weights(folder, change)


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _damaged_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models import tiny as tiny_models

    tokenizer = tiny_models.train_tokenizer(["another text altogether"], "<image>")
    tokenizer.save_pretrained(folder)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "processor_config.json").unlink()


def _other_picture_size(folder: Path) -> None:
    path = folder / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["image_processor"]["crop_size"] = {"height": 64, "width": 64}
    path.write_text(json.dumps(processor))


FAULTS = {
    "wrong family": (_wrong_family, "'qwen2_vl' checkpoint, not 'llava'"),
    "no config": (_no_config, "no config.json"),
    "config is no object": (_config_is_no_object, "config.json"),
    "config cut": (_config_cut, "config.json: not readable"),
    "missing shard": (_missing_shard, "missing: model-00002-of-00002.safetensors"),
    "index without map": (_index_without_map, "model.safetensors.index.json"),
    "no weights": (_no_weights, "no weights there"),
    "missing keys": (
        _missing_keys,
        "1 missing: model.language_model.layers.2.mlp.up_proj.weight",
    ),
    "surplus keys": (
        _surplus_keys,
        "1 surplus: model.language_model.layers.9.mlp.up_proj.weight",
    ),
    "wrong shape": (
        _wrong_shape,
        r"linear_1.weight is \[96, 63\] in the file, \[96, 64\] in config.json",
    ),
    "stored twice": (_twice, "lm_head.weight is stored twice"),
    "cut short": (_cut_short, "model.safetensors: damaged or cut short"),
    "damaged header": (_damaged_header, "model.safetensors: damaged or cut short"),
    "empty weights": (_empty_weights, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, "the tokenizer gives <image> the id"),
    "no tokenizer": (_no_tokenizer, "no usable processor"),
    "other picture size": (_other_picture_size, "64 x 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
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
    options = ModelOptions(checkpoint="/nowhere/llava", preset=None)
    with pytest.raises(CheckpointError, match="/nowhere/llava is no folder"):
        FAMILY.load(options, None)


def test_a_folder_without_processor_details_counts_pictures_by_its_model(
    folder: Path, tmp_path: Path
) -> None:
    """Older folders do not say patch size and extra tokens to the processor: config.json does."""
    from tests.unit.llava_material import example, picture

    older = tmp_path / "older"
    shutil.copytree(folder, older)
    processor = json.loads((older / "processor_config.json").read_text())
    (older / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    (older / "processor_config.json").unlink()
    loaded = load(older)
    one = example(loaded.processor, "a", "Which?", "5", [picture(1)])
    assert one.input_ids.count(loaded.processor.image_token_id) == 16
    with torch.no_grad():
        FAMILY.forward(loaded.model, FAMILY.collate([one], loaded.processor))


def test_tiny_checkpoints_repeat(tmp_path: Path) -> None:
    first, second = (tiny.write_checkpoint(tmp_path / name) for name in "ab")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "processor_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
