"""LLaVA folders as people have them: every layout loads, every fault is one named error."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from mmtrain.assemble import base_digests
from mmtrain.errors import CheckpointError
from mmtrain.models import decoding
from mmtrain.models.interface import ModelOptions
from tests import tiny
from tests.unit.folder_faults import (
    Faults,
    Tensors,
    assert_refused,
    config_cut,
    config_is_no_object,
    copied,
    edit_weights,
    stored_tensors,
    weights_cut_short,
    weights_header_damaged,
    with_config,
    with_json,
    with_tensors,
    without_files,
    without_tensors,
)
from tests.unit.llava_material import FAMILY, load, write_lively


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


def test_a_bin_file_of_before_torch_1_6(folder: Path, wanted: Tensors, tmp_path: Path) -> None:
    old = copied(folder, tmp_path / "old")
    tensors = stored_tensors(old)
    (old / "model.safetensors").unlink()
    torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_loads(old, wanted)


def test_the_digest_covers_every_file_that_was_read(folder: Path, tmp_path: Path) -> None:
    first = load(folder).weight_files
    assert [path.name for path in first] == ["model.safetensors"]
    other = copied(folder, tmp_path / "other")
    (other / "unused.safetensors").write_bytes(b"not read")
    second = load(other).weight_files
    assert base_digests(second) == base_digests(first)
    edit_weights(other, lambda tensors: next(iter(tensors.values())).add_(1.0))
    assert base_digests(load(other).weight_files)["weights"] != base_digests(first)["weights"]


def test_the_digests_name_each_small_file_that_is_read(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    (other / "results.json").write_text("{}")
    weights = [other / "model.safetensors"]
    before = base_digests(weights)
    assert {"config.json", "tokenizer.json", "processor_config.json"} <= before.keys()
    assert "results.json" not in before
    for name in ("config.json", "tokenizer.json", "processor_config.json"):
        (other / name).write_bytes((other / name).read_bytes() + b" ")
    now = base_digests(weights)
    changed = {name for name in before if now[name] != before[name]}
    assert changed == {"config.json", "tokenizer.json", "processor_config.json"}


def test_weights_changed_behind_size_and_time_are_seen(folder: Path, tmp_path: Path) -> None:
    weights = copied(folder, tmp_path / "other") / "model.safetensors"
    before, stat = base_digests([weights]), weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert base_digests([weights])["weights"] != before["weights"]


def test_a_wrong_cache_is_passed_over_on_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = [folder / "model.safetensors"]
    right = base_digests(weights)
    cache = tmp_path / "mmtrain" / "base-digests.json"
    cache.write_text(json.dumps({key: "0" * 64 for key in json.loads(cache.read_text())}))
    assert base_digests(weights) != right
    assert base_digests(weights, afresh=True) == right == base_digests(weights)


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
    assert_loads(copied(folder, tmp_path / layout, tensors), wanted)


def test_bf16_loads_the_rounded_weights(folder: Path, wanted: Tensors) -> None:
    options = ModelOptions(checkpoint=str(folder), preset=None, dtype="bf16")
    model = FAMILY.code.load(options, None).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wanted[name].to(torch.bfloat16)), name
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


# --- faults ---------------------------------------------------------------------------------------


def _missing_shard(folder: Path) -> None:
    index = {name: "model-00001-of-00002.safetensors" for name in stored_tensors(folder)}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    last = sorted(index)[-1]
    index[last] = "model-00002-of-00002.safetensors"
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _twice(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()

    edit_weights(folder, change)


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models import tiny as tiny_models

    tokenizer = tiny_models.train_tokenizer(["another text altogether"], "<image>")
    tokenizer.save_pretrained(folder)


FAULTS: Faults = {
    "wrong family": (with_config(model_type="qwen2_vl"), "'qwen2_vl' checkpoint, not 'llava'"),
    "no config": (without_files("config.json"), "no config.json"),
    "config is no object": (config_is_no_object, "config.json"),
    "config cut": (config_cut, "config.json: not readable"),
    "missing shard": (_missing_shard, "missing: model-00002-of-00002.safetensors"),
    "index without map": (_index_without_map, "model.safetensors.index.json"),
    "no weights": (without_files("model.safetensors"), "no weights there"),
    "missing keys": (
        without_tensors("language_model.model.layers.2.mlp.up_proj.weight"),
        "1 missing: model.language_model.layers.2.mlp.up_proj.weight",
    ),
    "surplus keys": (
        with_tensors({"language_model.model.layers.9.mlp.up_proj.weight": torch.ones(3, 3)}),
        "1 surplus: model.language_model.layers.9.mlp.up_proj.weight",
    ),
    "wrong shape": (
        with_tensors({"multi_modal_projector.linear_1.weight": torch.ones(96, 63)}),
        r"linear_1.weight is \[96, 63\] in the file, \[96, 64\] in config.json",
    ),
    "stored twice": (_twice, "lm_head.weight is stored twice"),
    "cut short": (weights_cut_short, "model.safetensors: damaged or cut short"),
    "damaged header": (weights_header_damaged, "model.safetensors: damaged or cut short"),
    "empty weights": (_empty_weights, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, "the tokenizer gives <image> the id"),
    "no tokenizer": (without_files("tokenizer*", "processor_config.json"), "no usable processor"),
    "other image size": (
        with_json(
            "processor_config.json", "image_processor", crop_size={"height": 64, "width": 64}
        ),
        "64 x 64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    harm, named = FAULTS[fault]
    assert_refused(folder, tmp_path / "damaged", harm, named, load, monkeypatch)


def test_no_folder() -> None:
    options = ModelOptions(checkpoint="/nowhere/llava", preset=None)
    with pytest.raises(CheckpointError, match="/nowhere/llava is no folder"):
        FAMILY.code.load(options, None)


def test_a_folder_without_processor_details_counts_images_by_its_model(
    folder: Path, tmp_path: Path
) -> None:
    """Older folders do not say patch size and extra tokens to the processor: config.json does."""
    from tests.unit.llava_material import example, image

    older = copied(folder, tmp_path / "older")
    processor = json.loads((older / "processor_config.json").read_text())
    (older / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    (older / "processor_config.json").unlink()
    loaded = load(older)
    one = example(loaded.processor, "a", "Which?", "5", [image(1)])
    assert one.input_ids.count(loaded.processor.image_token_id) == 16
    with torch.no_grad():
        decoding.forward(FAMILY, loaded.model, FAMILY.code.collate([one], loaded.processor))


def test_tiny_checkpoints_repeat(tmp_path: Path) -> None:
    first, second = (tiny.write_checkpoint(tmp_path / name) for name in "ab")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "processor_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
