"""Checkpoints in LLaVA's own format and ShareGPT4V's load as their Hugging Face tiny model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models import decoding
from mmtrain.models.interface import LoadedModel, ModelOptions
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from tests.unit.folder_faults import (
    Faults,
    Harm,
    Tensors,
    assert_refused,
    copied,
    edit_json,
    weights_header_damaged,
    with_config,
    with_json,
    with_tensors,
    without_files,
    without_tensors,
)
from tests.unit.llava_material import FAMILY, GREEDY, logits_of, mixed, write_lively
from tests.unit.llava_original import (
    TOWER,
    load_original,
    tiny_model_tensors,
    write_original,
    write_tower,
)

TOLERANCE = 1e-5
PUBLISHED = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
}
LARGER = dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="module")
def wanted(tiny_model: Path) -> Tensors:
    return tiny_model_tensors(tiny_model)


@pytest.fixture(scope="module")
def original(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tiny_model, tmp_path_factory.mktemp("original") / "llava")


def assert_equal(loaded: LoadedModel, wanted: Tensors) -> None:
    found = dict(loaded.model.named_parameters())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


FORMS: dict[str, dict[str, Any]] = {
    "one safetensors file": {},
    "sharded safetensors": {"shards": 3},
    "one .bin file": {"kind": "bin"},
    "sharded .bin": {"kind": "bin", "shards": 3},
    "tower inside": {"tower": "inside", "kind": "bin", "shards": 2},
    "ShareGPT4V": {"model_type": "share4v"},
    "ShareGPT4V, tower inside": {"model_type": "share4v", "tower": "inside"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_bit_equal(
    tiny_model: Path, wanted: Tensors, tmp_path: Path, form: str
) -> None:
    folder = write_original(tiny_model, tmp_path / "original", **FORMS[form])
    assert_equal(load_original(folder), wanted)


@pytest.mark.parametrize("full", [False, True])
def test_a_tower_beside_is_named_in_the_run_file(
    tiny_model: Path, wanted: Tensors, tmp_path: Path, full: bool
) -> None:
    folder = write_original(tiny_model, tmp_path / "original", tower="missing")
    vision = {n.removeprefix(TOWER): t for n, t in wanted.items() if n.startswith(TOWER)}
    tower = write_tower(tiny_model, tmp_path / "clip", vision, full=full)
    if full:  # openai's folder, whose settings have their oldest form
        old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
        edit_json(tower / "preprocessor_config.json", image_processor_type=None, **old)
    assert_equal(load_original(folder, tower), wanted)


def test_the_tower_may_be_named_by_its_full_path(
    tiny_model: Path, wanted: Tensors, tmp_path: Path
) -> None:
    folder = write_original(tiny_model, tmp_path / "original", tower="beside")
    path = (tmp_path / "original-tower").resolve()
    edit_json(folder / "config.json", mm_vision_tower=str(path))
    assert_equal(load_original(folder), wanted)


def test_a_tuned_tower_inside_wins_over_a_folder(
    tiny_model: Path, wanted: Tensors, tmp_path: Path
) -> None:
    folder = write_original(tiny_model, tmp_path / "original", tower="inside")
    untuned = {
        name.removeprefix(TOWER): torch.zeros_like(tensor)
        for name, tensor in wanted.items()
        if name.startswith(TOWER)
    }
    assert_equal(load_original(folder, write_tower(tiny_model, tmp_path / "clip", untuned)), wanted)


def test_forward_and_generation_equal_the_tiny_models(tiny_model: Path, original: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    reference = LlavaForConditionalGeneration.from_pretrained(
        tiny_model, dtype=torch.float32
    ).eval()
    loaded = load_original(original)
    size = loaded.config.text_config.vocab_size
    assert loaded.processor.image_token_id == loaded.config.image_token_id == size
    examples = mixed(loaded.processor)
    batch = FAMILY.code.collate(examples, loaded.processor)
    with torch.no_grad():
        ours = logits_of(loaded.model, batch)
    for row, one in enumerate(examples):
        inputs: dict[str, Any] = {"input_ids": torch.tensor([one.input_ids])}
        if one.pixels:
            inputs["pixel_values"] = torch.stack(list(one.pixels))
        with torch.no_grad():
            theirs = reference(**inputs).logits[0, :, :size]
        assert theirs.abs().max() > 0.5
        difference = (ours[row, : len(one.input_ids)] - theirs).abs().max()
        assert difference <= TOLERANCE * theirs.abs().max()
    answers = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)
    assert len(answers) == len(examples) and any(answers)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 7_062_902_784),
        ({"model_type": "share4v"}, 7_062_902_784),
        ({"model_type": "llava_llama"}, 7_062_902_784),
        (LARGER, 13_350_839_296),
    ],
)
def test_published_configurations_have_the_published_size(
    tmp_path: Path, changes: dict[str, Any], parameters: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    config = FAMILY.code.model_config(ModelOptions(str(tmp_path), None))
    with torch.device("meta"):
        model = FAMILY.code.skeleton(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.image_token_id == config.text_config.vocab_size == 32000
    assert config.text_config.rope_parameters["rope_theta"] == 10000.0
    assert (config.vision_feature_layer, config.vision_config.hidden_act) == (-2, "quick_gelu")
    assert FAMILY.code.image_tokens(config, "llm") == 576


def test_sharegpt4v_has_the_shape_of_llava() -> None:
    shapes = FAMILY.presets
    assert shapes["sharegpt4v-7b"] == shapes["llava-1.5-7b"]


# --- faults ---------------------------------------------------------------------------------------


def _missing_in_tower(folder: Path) -> None:
    path = folder / "tower" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    del tensors["vision_model.pre_layrnorm.bias"]
    torch.save(tensors, path)


def _damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x99no model at all")


LARGER_IMAGES = {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}}
FAULTS: Faults = {
    "missing tower": (
        with_config(mm_vision_tower="openai/clip-vit-large-patch14-336"),
        "mm_vision_tower is 'openai/clip-vit-large-patch14-336'.*model.vision_tower",
    ),
    "tower of another kind": (
        with_json("tower/config.json", model_type="siglip_vision_model"),
        "siglip_vision_model.*no CLIP",
    ),
    "one linear layer": (with_config(mm_projector_type="linear"), "mm_projector_type is 'linear'"),
    "projector not named": (with_config(mm_projector_type=None), "mm_projector_type is 'linear'"),
    "tiles": (with_config(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "marked images": (with_config(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "other features": (with_config(mm_vision_select_feature="cls"), "select_feature is 'cls'"),
    "missing key": (
        without_tensors("model.mm_projector.2.bias"),
        "1 missing: model.multi_modal_projector.linear_2.bias",
    ),
    "missing in the tower": (_missing_in_tower, "1 missing: model.vision_tower.pre_layrnorm.bias"),
    "surplus key": (
        with_tensors({"model.image_newline": torch.ones(3)}),
        "1 surplus: model.image_newline",
    ),
    "other vocabulary": (with_config(vocab_size=400), "config.json says 400"),
    "no tokenizer": (without_files("tokenizer.json"), "no usable tokenizer"),
    "damaged tokenizer": (_damaged_tokenizer, "tokenizer.model: no sentencepiece model"),
    "no beginning": (
        with_json("tokenizer.json", post_processor=None),
        "does not begin a text with <s>",
    ),
    "larger images": (with_json("tower/preprocessor_config.json", **LARGER_IMAGES), "64 x 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    harm, named = FAULTS[fault]
    assert_refused(original, tmp_path / "damaged", harm, named, load_original, monkeypatch)


def test_tiles_are_refused_in_hugging_face_folders_too(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "tiled")
    edit_json(folder / "config.json", image_aspect_ratio="anyres")
    with pytest.raises(CheckpointError, match="anyres"):
        load_original(folder)


def test_a_named_tower_that_is_no_folder(original: Path) -> None:
    with pytest.raises(CheckpointError, match="model.vision_tower: /nowhere is no folder"):
        load_original(original, Path("/nowhere"))


class Intruder:
    """Unpickling it would touch a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_code_in_a_bin_file_is_never_run(tiny_model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write_original(tiny_model, tmp_path / "original", kind="bin")
    path = folder / "pytorch_model.bin"
    torch.save({**torch.load(path, weights_only=True), "more": Intruder(canary)}, path)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: damaged, or holds more than"):
        load_original(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("harm", "named"),
    [FAULTS["missing tower"], (weights_header_damaged, "model.safetensors: damaged or cut short")],
)
def test_check_refuses_what_training_refuses(
    original: Path, tmp_path: Path, harm: Harm, named: str
) -> None:
    def check(folder: Path) -> None:
        model = {"family": "llava", "checkpoint": str(folder)}
        examine(resolve({"model": model}), world_size=1)

    check(original)
    harm(copied(original, tmp_path / "damaged"))
    with pytest.raises(CheckpointError, match=named):
        check(tmp_path / "damaged")
    for weights in (tmp_path / "damaged").glob("**/*.safetensors"):
        weights.unlink()
    check(tmp_path / "damaged")  # to plan, the configuration is enough
