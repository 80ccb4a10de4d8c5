"""Qwen-VL folders as people have them: the published layout loads, every fault is one error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.config.schema import ComponentConfig
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models.families.qwen_vl.visual import sine_positions
from mmtrain.models.interface import ModelOptions
from mmtrain.peft.placement import component_of, select
from mmtrain.peft.trainable import make_trainable, weight_shapes
from tests.unit.added_parameters import num_added
from tests.unit.folder_faults import (
    Faults,
    Tensors,
    assert_refused,
    edit_json,
    stored_tensors,
    with_config,
    with_tensors,
    without_files,
    without_tensors,
)
from tests.unit.qwen_vl_material import (
    FAMILY,
    GOLDEN,
    PUBLISHED,
    load,
    write_lively,
)

PUBLISHED_ELEMENTS = 9_656_935_168  # the index's total_size in bytes of bf16, by two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("qwen_vl"))


@pytest.fixture(scope="module")
def chat() -> Any:
    """The preset of the published shape, without memory for it."""
    config = FAMILY.code.model_config(ModelOptions(None, "qwen-vl-chat"))
    with torch.device("meta"):
        return FAMILY.code.skeleton(config)


def published_names() -> list[str]:
    """The names of the published index; {0..n} stands for every number."""
    names = []
    for line in (GOLDEN / "weight_names.txt").read_text().split():
        found = re.search(r"\{0\.\.(\d+)\}", line)
        if found is None:
            names.append(line)
        else:
            names += [line.replace(found[0], str(n)) for n in range(int(found[1]) + 1)]
    return names


def test_the_preset_has_the_published_names_and_size(chat: Any) -> None:
    state = chat.state_dict()
    assert sorted(state) == sorted(published_names()) and len(state) == 853
    assert sum(tensor.numel() for tensor in state.values()) == PUBLISHED_ELEMENTS
    assert {name for name, _ in chat.named_parameters()} == set(state)


def test_the_names_are_those_of_the_published_index() -> None:
    path = PUBLISHED / "pytorch_model.bin.index.json"
    if not path.is_file():
        pytest.skip(f"the published index is not at {path}")
    index = json.loads(path.read_text())
    assert sorted(index["weight_map"]) == sorted(published_names())
    assert index["metadata"]["total_size"] == 2 * PUBLISHED_ELEMENTS
    assert (PUBLISHED / "config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()


def test_the_preset_is_the_published_configuration(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "config.json", tmp_path)
    stored = FAMILY.code.model_config(ModelOptions(str(tmp_path), None))
    preset = FAMILY.code.model_config(ModelOptions(None, "qwen-vl-chat"))
    unlike = {"architectures", "bf16", "fp16", "fp32", "onnx_safe", "tokenizer_type"}
    unlike |= {"use_flash_attn", "_name_or_path", "transformers_version"}
    first, second = (
        {key: value for key, value in one.to_dict().items() if key not in unlike}
        for one in (stored, preset)
    )
    assert first == second and "auto_map" not in first


def test_components_have_the_published_sizes(chat: Any) -> None:
    counts: dict[str, int] = {}
    for name, parameter in chat.named_parameters():
        component = component_of(FAMILY, name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    assert counts["embeddings"] + counts["head"] == 1_244_659_712
    # The resampler's 75,005,952 without its fixed positions, the last norm, the last projection.
    assert counts["connector"] == 75_005_952 + 8_192 + 4_096**2
    assert counts["connector_positions"] == 256 * 4_096
    assert sum(counts.values()) == PUBLISHED_ELEMENTS


def test_lora_on_the_published_modules_has_the_published_size(chat: Any) -> None:
    options = {"method": "lora", "r": 128, "alpha": 256, "dropout": 0.05}
    block = ComponentConfig(mode="peft", **options)
    linears, _ = select(FAMILY, "llm", block, weight_shapes(chat))
    kinds = {re.sub(r"\.\d+\.", ".N.", linear.name) for linear in linears}
    found = {kind.removeprefix("transformer.h.N.") for kind in kinds}
    assert found == {"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2"}
    assert num_added(chat, FAMILY, "llm", **options) == 224_395_264


def test_full_training_of_the_connector_leaves_its_fixed_positions(folder: Path) -> None:
    model = load(folder).model
    make_trainable(model, FAMILY, {"connector": ComponentConfig(mode="full")}, seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "transformer.visual.attn_pool.pos_embed" not in trained
    assert {"transformer.visual.proj", "transformer.visual.attn_pool.query"} <= trained


def test_new_positions_are_sines_of_column_and_row() -> None:
    model = FAMILY.code.load(ModelOptions(None, "tiny", dtype="fp32"), None).model
    found = model.get_parameter("transformer.visual.attn_pool.pos_embed")
    assert torch.equal(found, sine_positions(16, 96))
    row, column, channel = 2, 3, 5
    for half, place in ((0, column), (48, row)):
        angle = torch.tensor(place / 10000 ** (channel / 24))
        assert float(found[4 * row + column, half + channel]) == pytest.approx(float(angle.sin()))
        assert float(found[4 * row + column, half + 24 + channel]) == pytest.approx(
            float(angle.cos())
        )


# --- layouts --------------------------------------------------------------------------------------


def assert_loads(folder: Path, wanted: Tensors) -> None:
    found = dict(load(folder).model.named_parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_safetensors_file(folder: Path) -> None:
    assert_loads(folder, stored_tensors(folder))


def test_published_bin_shards_with_an_index(folder: Path, tmp_path: Path) -> None:
    tensors = stored_tensors(folder)
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, tmp_path, ignore=ignored, dirs_exist_ok=True)
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:30], sorted(tensors)[30:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, tmp_path / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_loads(tmp_path, tensors)


def test_bf16_loads_the_rounded_weights(folder: Path) -> None:
    wanted = stored_tensors(folder)
    model = load(folder, dtype="bf16").model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name].to(torch.bfloat16)), name
    assert not list(model.named_buffers())


def test_a_saved_folder_has_the_published_layout(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path)
    assert_loads(tmp_path, stored_tensors(folder))
    saved, given = (json.loads((one / "config.json").read_text()) for one in (tmp_path, folder))
    assert saved["model_type"] == "qwen" and saved["visual"] == given["visual"]
    assert saved["architectures"] == ["QWenLMHeadModel"]
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# --- options --------------------------------------------------------------------------------------


def test_overrides_change_shapes_together(folder: Path) -> None:
    overrides = {"llm": {"hidden_size": 64}, "vision": {"hidden_size": 48, "layers": 1}}
    loaded = load(folder, overrides=overrides, allow_reinit=True)
    visual = loaded.config.visual
    assert (visual["output_dim"], visual["width"], visual["layers"]) == (64, 48, 1)
    shapes = {name: tuple(value.shape) for name, value in loaded.model.named_parameters()}
    assert shapes["transformer.visual.transformer.resblocks.0.mlp.c_fc.weight"] == (128, 48)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (192, 64)
    found = loaded.model.get_parameter("transformer.visual.attn_pool.pos_embed")
    assert torch.equal(found, sine_positions(16, 64))
    with pytest.raises(CheckpointError, match="do not fit model.overrides"):
        load(folder, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"llm": {"hidden_size": 90}}, "no multiple of 4 heads"),
        ({"llm": {"heads": 32}}, "kv_channels 3 is no multiple of 2"),
        ({"vision": {"heads": 5}}, "no multiple of 5 heads"),
        ({"llm": {"intermediate_size": 101}}, "intermediate_size 101 is no multiple of 2"),
        ({"connector": {"layers": 2}}, "connector: has no shape"),
    ],
)
def test_overrides_that_do_not_add_up(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FAMILY.code.model_config(ModelOptions(None, "tiny", overrides=overrides))


def test_dropout_of_the_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", attn_dropout_prob=0.1, emb_dropout_prob=0.2)
    assert load(tmp_path).config.attn_dropout_prob == 0.0
    assert load(folder, base_dropout="checkpoint").config.attn_dropout_prob == 0.0
    stored = FAMILY.code.model_config(ModelOptions(str(tmp_path), None, base_dropout="stored"))
    assert (stored.attn_dropout_prob, stored.emb_dropout_prob) == (0.1, 0.2)
    with pytest.raises(CheckpointError, match="model.base_dropout"):
        load(tmp_path, base_dropout="checkpoint")


# --- faults ---------------------------------------------------------------------------------------


def _other_tokenizer(folder: Path) -> None:
    (folder / "qwen.tiktoken").write_bytes((GOLDEN / "first-1000.tiktoken").read_bytes())


FAULTS: Faults = {
    "wrong family": (with_config(model_type="llava"), "'llava' checkpoint, not 'qwen'"),
    "no image side": (with_config(visual=None), "config.json: has no 'visual' part"),
    "image side incomplete": (with_config("visual", width=None), "visual.width is missing"),
    "image side of another kind": (
        with_config("visual", heads="4"),
        "visual.heads is '4', not a number",
    ),
    "config of another kind": (with_config(hidden_size="wide"), "not a configuration of 'qwen'"),
    "heads do not add up": (
        with_config(kv_channels=20),
        "kv_channels x heads is 80, hidden_size 96",
    ),
    "part of a head turned": (with_config(rotary_pct=0.5), "rotary_pct is 0.5, only 1.0 is known"),
    "queries are no square": (
        with_config("visual", n_queries=15),
        "visual.n_queries 15 is no square",
    ),
    "missing keys": (
        without_tensors("transformer.h.2.mlp.w2.weight"),
        "1 missing: transformer.h.2.mlp.w2.weight",
    ),
    "surplus keys": (
        with_tensors({"transformer.h.9.mlp.w2.weight": torch.ones(3, 3)}),
        "1 surplus: transformer.h.9.mlp.w2.weight",
    ),
    "wrong shape": (
        with_tensors({"lm_head.weight": torch.ones(7, 96)}),
        r"lm_head.weight is \[7, 96\] in the file",
    ),
    "other tokenizer": (_other_tokenizer, "gives <img> the id 1214, config.json says"),
    "no tokenizer": (without_files("qwen.tiktoken"), "no readable qwen.tiktoken"),
    "small vocabulary": (with_config(vocab_size=540), "tokens, config.json 540 embeddings"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    harm, named = FAULTS[fault]
    assert_refused(folder, tmp_path / "damaged", harm, named, load, monkeypatch)
