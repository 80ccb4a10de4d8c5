"""Folders of Qwen2-VL, 2.5 and 3 as people have them: layouts, budgets, overrides, faults."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import ModelOptions
from tests.unit.folder_faults import Tensors, copied, edit_json, stored_tensors
from tests.unit.qwen2_vl_material import (
    FAMILY,
    GREEDY,
    TINY,
    example,
    image,
    load,
    mixed,
    reference,
    write_lively,
    write_plain,
)

PUBLISHED_PARAMETERS = {
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-8b": 8_767_123_696,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen2_vl")
    return {name: write_lively(root / name, name) for name in TINY}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, Tensors]:
    """What transformers itself loads from each folder."""
    return {name: dict(reference(folders[name], name).named_parameters()) for name in TINY}


def assert_loads(folder: Path, wanted: Tensors) -> None:
    """Every parameter is bit-equal to transformers' own."""
    found = dict(load(folder).model.named_parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        model = FAMILY.code.skeleton(FAMILY.code.model_config(ModelOptions(None, preset)))
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == PUBLISHED_PARAMETERS[preset]


@pytest.mark.parametrize("preset", TINY)
def test_presets_are_not_changed_by_use(preset: str) -> None:
    options = ModelOptions(None, preset, overrides={"llm": {"layers": 5}})
    before = json.dumps(FAMILY.presets[preset])
    assert FAMILY.code.model_config(options).text_config.num_hidden_layers == 5
    assert json.dumps(FAMILY.presets[preset]) == before


OVERRIDES = {
    "shallow": {"vision": {"layers": 1}, "llm": {"layers": 2}},
    "deeper": {"vision": {"layers": 5}, "llm": {"layers": 4}},
    "narrow tower": {"vision": {"hidden_size": 32, "heads": 2}},
    "wide llm": {"llm": {"hidden_size": 96, "heads": 6, "intermediate_size": 64}},
    "wide heads": {"llm": {"heads": 2}},
}


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("changed", OVERRIDES)
def test_overridden_shapes_still_compute(
    folders: dict[str, Path], preset: str, changed: str
) -> None:
    options = {"overrides": OVERRIDES[changed], "allow_reinit": True}
    loaded = load(folders[preset], **options)
    batch = FAMILY.code.collate(mixed(loaded.processor), loaded.processor)
    with torch.no_grad():
        assert torch.isfinite(decoding.forward(FAMILY, loaded.model, batch).answer_loss_sum)


def test_new_shapes_need_leave_to_be_initialised(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="model.allow_reinit: true"):
        load(folders["tiny-3"], overrides=OVERRIDES["narrow tower"])
    fewer: Any = load(folders["tiny-3"], overrides=OVERRIDES["shallow"]).model
    assert len(fewer.model.visual.deepstack_merger_list) == 1


WRONG_OVERRIDES = {
    "channels per head": ({"llm": {"heads": 64}}, "rotary sections"),
    "odd heads": ({"vision": {"heads": 32}}, "multiple of 4"),
    "shared heads": ({"llm": {"heads": 3, "hidden_size": 48}}, "3 heads and 2 key-value heads"),
    "no layer to feed": ({"llm": {"layers": 1}}, "give at least 2 layers"),
    "connector": ({"connector": {"layers": 1}}, "model.overrides.connector: has no shape"),
}


@pytest.mark.parametrize("wrong", WRONG_OVERRIDES)
def test_overrides_that_cannot_compute_are_named(wrong: str) -> None:
    changes, named = WRONG_OVERRIDES[wrong]
    with pytest.raises(ConfigError, match=named):
        FAMILY.code.model_config(ModelOptions(None, "tiny-3", overrides=changes))


def test_lists_of_blocks_follow_the_depth(caplog: pytest.LogCaptureFixture) -> None:
    options = ModelOptions(None, "qwen2.5-vl-7b", overrides={"vision": {"layers": 20}})
    assert FAMILY.code.model_config(options).vision_config.fullatt_block_indexes == [7, 15]
    assert "20 vision blocks, so fullatt_block_indexes is [7, 15]" in caplog.text


def test_rotary_sections_follow_the_heads(caplog: pytest.LogCaptureFixture) -> None:
    options = ModelOptions(None, "qwen3-vl-8b", overrides={"llm": {"heads": 16}})
    text = FAMILY.code.model_config(options).text_config
    assert text.head_dim == 256 and text.rope_parameters["mrope_section"] == [48, 40, 40]
    assert "256 channels per head, so mrope_section is [48, 40, 40]" in caplog.text


def test_attention_dropout_cannot_be_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["tiny"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (copy / "config.json").write_text(json.dumps(config))
    assert load(copy).config.text_config.attention_dropout == 0.0
    stored = FAMILY.code.model_config(ModelOptions(str(copy), None, base_dropout="stored"))
    assert stored.text_config.attention_dropout == 0.1, "lost on the way through export"
    with pytest.raises(CheckpointError, match="model.base_dropout"):
        load(copy, base_dropout="checkpoint")


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
def test_one_file(folders: dict[str, Path], wanted: dict[str, Tensors], preset: str) -> None:
    assert_loads(folders[preset], wanted[preset])


@pytest.mark.parametrize("preset", TINY)
def test_sharded_with_an_index(
    folders: dict[str, Path], wanted: dict[str, Tensors], preset: str, tmp_path: Path
) -> None:
    shutil.copytree(folders[preset], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    reference(folders[preset], preset).save_pretrained(tmp_path / "copy", max_shard_size="400KB")
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 3
    assert_loads(tmp_path / "copy", wanted[preset])


SIDE_BY_SIDE = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
PUBLISHED = {"tiny": SIDE_BY_SIDE, "tiny-2.5": SIDE_BY_SIDE, "tiny-3": ()}


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("layout", ["published", "module names"])
def test_key_layouts(
    folders: dict[str, Path], wanted: dict[str, Tensors], preset: str, layout: str, tmp_path: Path
) -> None:
    tensors = {}
    for name, tensor in wanted[preset].items():
        for pattern, replacement in PUBLISHED[preset] if layout == "published" else ():
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor.detach().clone()
    # A buffer that some versions stored.
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.ones(4)
    assert_loads(copied(folders[preset], tmp_path / "copy", tensors), wanted[preset])


def test_the_flat_configuration_as_published(folders: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2-VL's config.json has no text_config, and writes M-RoPE its first way."""
    copy = shutil.copytree(folders["tiny"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"], text["layer_types"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    vision = {**config["vision_config"], "model_type": "qwen2_vl", "in_chans": 3}
    del vision["rope_parameters"]
    (copy / "config.json").write_text(json.dumps({**config, **text, "vision_config": vision}))
    pixels = json.loads((copy / "preprocessor_config.json").read_text())
    size = pixels.pop("size")
    pixels |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (copy / "preprocessor_config.json").write_text(json.dumps(pixels))
    flat, nested = load(copy), load(folders["tiny"])
    assert flat.processor.image_processor.size == nested.processor.image_processor.size
    examples = mixed(flat.processor)
    losses = [
        decoding.forward(
            FAMILY, one.model, FAMILY.code.collate(examples, one.processor)
        ).answer_loss_sum.item()
        for one in (flat, nested)
    ]
    assert losses[0] == losses[1]


def test_a_processor_stored_in_one_file(folders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers' own processor class saves it today."""
    copy = shutil.copytree(folders["tiny-3"], tmp_path / "copy")
    pixels = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    stored = {"image_processor": pixels, "processor_class": "Qwen3VLProcessor"}
    (copy / "processor_config.json").write_text(json.dumps(stored))
    assert example(load(copy).processor, "a", "Which?", "5", [image(1)]).pixels


@pytest.mark.parametrize("preset", TINY)
def test_bf16_loads_the_rounded_weights(
    folders: dict[str, Path], wanted: dict[str, Tensors], preset: str
) -> None:
    model = load(folders[preset], dtype="bf16").model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wanted[preset][name].to(torch.bfloat16)), name
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert len(frequencies) == 4
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)


@pytest.mark.parametrize("preset", TINY)
def test_a_saved_folder_loads_here_and_in_transformers(
    folders: dict[str, Path], wanted: dict[str, Tensors], preset: str, tmp_path: Path
) -> None:
    loaded = load(folders[preset], max_pixels=32 * 32)
    state = {name: tensor.detach() for name, tensor in loaded.model.named_parameters()}
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path)
    assert_loads(tmp_path, wanted[preset])
    theirs = dict(reference(tmp_path, preset).named_parameters())
    assert all(torch.equal(theirs[name], wanted[preset][name]) for name in wanted[preset])
    again = load(tmp_path)
    assert again.processor.image_processor.size.longest_edge == 32 * 32
    examples = mixed(loaded.processor)
    assert [one.input_ids for one in mixed(again.processor)] == [one.input_ids for one in examples]
    answers = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)
    assert decoding.generate(FAMILY, again.model, again.processor, examples, GREEDY) == answers
    assert again.processor.tokenizer.chat_template == loaded.processor.tokenizer.chat_template


@pytest.mark.parametrize("preset", TINY)
def test_tiny_checkpoints_repeat(preset: str, tmp_path: Path) -> None:
    first, second = (write_plain(tmp_path / name, preset) for name in "ab")
    files = sorted(path.name for path in first.iterdir())
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} < set(files)
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("preset", TINY)
def test_tied_embeddings(folders: dict[str, Path], preset: str, tmp_path: Path) -> None:
    """The smaller published models store no head."""
    tensors = stored_tensors(folders[preset])
    del tensors["lm_head.weight"]
    copy = copied(folders[preset], tmp_path / "copy", tensors)
    edit_json(copy / "config.json", tie_word_embeddings=True)
    loaded: Any = load(copy)
    embeddings = loaded.model.get_input_embeddings().weight
    assert loaded.model.get_output_embeddings().weight is embeddings
    state = {name: tensor.detach() for name, tensor in loaded.model.named_parameters()}
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    assert_loads(tmp_path / "saved", dict(reference(copy, preset).named_parameters()))


def test_a_base_models_tokenizer_ends_answers_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its eos is the end of a text; an answer in our form still ends with its turn."""
    copy = shutil.copytree(folders["tiny"], tmp_path / "copy")
    edit_json(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    processor = load(copy).processor
    to_id = processor.tokenizer.convert_tokens_to_ids
    assert processor.tokenizer.eos_token == "<|endoftext|>"
    assert set(processor.stop_ids) == {to_id("<|endoftext|>"), to_id("<|im_end|>")}


# --- the budget of pixels -------------------------------------------------------------------------


def test_max_pixels_caps_every_image(folders: dict[str, Path]) -> None:
    sizes = {}
    for max_pixels in (None, 32 * 32, 16 * 16):
        processor = load(folders["tiny"], max_pixels=max_pixels).processor
        one = example(processor, "a", "Which?", "5", [image(1, (64, 64))])
        sizes[max_pixels] = one.extras["grid"]
    assert sizes == {None: [(1, 16, 16)], 1024: [(1, 8, 8)], 256: [(1, 4, 4)]}


def test_a_cap_below_the_least_image_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="model.max_pixels: got 255.* give 256 or more"):
        load(folders["tiny"], max_pixels=255)
