"""InstructBLIP folders as people have them: every layout loads, every fault is one named error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models import decoding
from mmtrain.models.interface import ModelOptions
from tests.unit.folder_faults import (
    Faults,
    Tensors,
    assert_refused,
    copied,
    stored_tensors,
    weights_cut_short,
    with_config,
    with_json,
    with_more_tokens,
    with_tensors,
    without_files,
    without_tensors,
)
from tests.unit.instructblip_material import (
    FAMILY,
    GREEDY,
    TEXTS,
    TINY_MODELS,
    example,
    image,
    load,
    mixed,
    our_logits,
    reference_logits,
    reference_of,
    write_lively,
)

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("instructblip")
    return {preset: write_lively(base, preset) for preset in TINY_MODELS}


@pytest.fixture(params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, folders: Folders) -> Path:
    return folders[request.param]


def assert_loads(folder: Path, wanted: Tensors) -> None:
    """Every parameter is bit-equal to what is stored."""
    found = dict(load(folder).model.named_parameters())
    assert found and all(torch.equal(found[name], wanted[name]) for name in found)


def test_what_transformers_loads(folder: Path) -> None:
    assert_loads(folder, dict(reference_of(folder).named_parameters()))


def test_published_names_and_what_is_no_weight(folder: Path, tmp_path: Path) -> None:
    wanted = stored_tensors(folder)
    extra = {
        "qformer.embeddings.position_ids": torch.arange(128)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    if "language_model.shared.weight" in wanted:
        cross = "language_model.decoder.block.0.layer.1.EncDecAttention"
        extra[f"{cross}.relative_attention_bias.weight"] = torch.ones(32, 4)
        for stack in ("encoder", "decoder"):
            shared = wanted["language_model.shared.weight"].clone()
            extra[f"language_model.{stack}.embed_tokens.weight"] = shared
    else:
        extra["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert_loads(copied(folder, tmp_path / "published", {**wanted, **extra}), wanted)


def test_sharded_bin_files(folder: Path, tmp_path: Path) -> None:
    wanted = stored_tensors(folder)
    target = copied(folder, tmp_path / "bin")
    (target / "model.safetensors").unlink()
    names = sorted(wanted)
    index = {}
    for number, part in enumerate((names[:50], names[50:])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: wanted[name] for name in part}, target / file)
        index.update({name: file for name in part})
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_loads(target, wanted)


def test_a_tied_head_is_tied(folders: Folders, tmp_path: Path) -> None:
    """A folder that stores no head of T5's own shares the embedding, as transformers does."""
    tensors = stored_tensors(folders["tiny"])
    del tensors["language_model.lm_head.weight"]
    target = copied(folders["tiny"], tmp_path / "tied", tensors)
    llm: Any = load(target).model.language_model
    assert llm.lm_head.weight is llm.shared.weight
    loaded, reference = load(target), reference_of(target)
    with torch.no_grad():
        for one in mixed(loaded.processor):
            batch = FAMILY.code.collate([one], loaded.processor)
            logits = reference_logits(reference, loaded.processor, one)
            labels = torch.tensor(one.labels)
            wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = decoding.forward(FAMILY, loaded.model, batch).answer_loss_sum
            assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_bf16_loads_the_rounded_weights_everywhere(folder: Path) -> None:
    wanted = stored_tensors(folder)
    loaded = load(folder, dtype="bf16")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, wanted[name].to(torch.bfloat16)), name
    with torch.no_grad():
        examples = mixed(loaded.processor)
        result = decoding.forward(
            FAMILY, loaded.model, FAMILY.code.collate(examples, loaded.processor)
        )
    assert torch.isfinite(result.answer_loss_sum)
    assert decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)


def test_saved_folders_load_here_and_in_transformers(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    state = {name: parameter.detach() + 0.01 for name, parameter in loaded.model.named_parameters()}
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    assert_loads(tmp_path / "saved", state)
    reference, again = reference_of(tmp_path / "saved"), load(tmp_path / "saved")
    theirs = dict(reference.named_parameters())
    assert all(torch.equal(theirs[name], state[name]) for name in state)
    stored, written = (
        json.loads((place / "config.json").read_text())["text_config"]
        for place in (folder, tmp_path / "saved")
    )
    assert written.get("dense_act_fn") == stored.get("dense_act_fn")
    examples = mixed(again.processor)
    with torch.no_grad():
        ours = our_logits(again.model, FAMILY.code.collate(examples, again.processor))
    wanted = [reference_logits(reference, again.processor, one) for one in examples]
    assert (ours - torch.cat(wanted)).abs().max() <= 1e-5


def test_older_folders_know_no_image_token(folder: Path, tmp_path: Path) -> None:
    """Neither configuration nor tokenizer nor processor of the first published folders had it."""
    older = copied(folder, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    token = config.pop("image_token_index")
    (older / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((older / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] != token]
    (older / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = json.loads((older / "processor_config.json").read_text())
    (older / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    (older / "processor_config.json").unlink()
    then, now = load(older), load(folder)
    assert then.processor.image_token_id == token == then.config.image_token_id
    examples = [mixed(one.processor) for one in (then, now)]
    assert examples[0][0].input_ids == examples[1][0].input_ids
    with torch.no_grad():
        results = [
            decoding.forward(FAMILY, one.model, FAMILY.code.collate(given, one.processor))
            for one, given in zip((then, now), examples, strict=True)
        ]
    assert torch.equal(results[0].per_sample_loss, results[1].per_sample_loss)


def test_tiny_checkpoints_repeat(tmp_path: Path) -> None:
    for preset in TINY_MODELS:
        for name in "ab":
            FAMILY.code.write_tiny(tmp_path / preset / name, TEXTS, 5, preset)
        files = {
            path.relative_to(tmp_path / preset / "a")
            for path in (tmp_path / preset / "a").rglob("*")
            if path.is_file()
        }
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {str(f) for f in files}
        for file in files:
            first, second = (tmp_path / preset / name / file for name in "ab")
            assert first.read_bytes() == second.read_bytes(), file


def test_tiny_models_keep_the_published_dropout(tmp_path: Path) -> None:
    FAMILY.code.write_tiny(tmp_path, TEXTS, 0, "tiny")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["qformer_config"]["hidden_dropout_prob"] == 0.1
    assert stored["text_config"]["dropout_rate"] == 0.1
    assert stored["text_config"]["dense_act_fn"] == "gelu"


# --- faults ---------------------------------------------------------------------------------------


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models.families.instructblip import tiny_model

    tiny_model.t5_tokenizer(["another text altogether"]).save_pretrained(folder)


FAULTS: Faults = {
    "wrong family": (
        with_config(model_type="blip-2"),
        "is a 'blip-2' checkpoint, not 'instructblip'",
    ),
    "other language model": (
        with_config(text_config={"model_type": "opt"}),
        "its language model is 'opt'",
    ),
    "no decoder start": (
        with_config("text_config", decoder_start_token_id=None),
        "config.json: names no decoder_start_token_id",
    ),
    "no config": (without_files("config.json"), "no config.json"),
    "config of wrong types": (
        with_config("qformer_config", hidden_size="wide"),
        "not a configuration of 'instructblip'",
    ),
    "no weights": (
        without_files("model.safetensors"),
        "no weights there: neither model.safetensors",
    ),
    "missing keys": (
        without_tensors("query_tokens", "qformer.encoder.layer.1.output_query.dense.bias"),
        "2 missing: qformer.encoder.layer.1.output_query.dense.bias, query_tokens",
    ),
    "surplus keys": (
        with_tensors({"qformer.cls.bias": torch.ones(3)}),
        "1 surplus: qformer.cls.bias",
    ),
    "wrong shape": (
        with_tensors({"query_tokens": torch.ones(1, 7, 64)}),
        r"query_tokens is \[1, 7, 64\] in the file, \[1, 8, 64\]",
    ),
    "cut short": (weights_cut_short, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, "the tokenizer gives <image> the id"),
    "larger tokenizer": (with_more_tokens(99), "the tokenizer has [0-9]+ tokens, config.json"),
    "larger Q-Former tokenizer": (
        with_more_tokens(1, "qformer_tokenizer"),
        "qformer_tokenizer: the tokenizer has [0-9]+ tokens, config.json",
    ),
    "no tokenizer": (without_files("tokenizer.json"), "damaged: no usable tokenizer"),
    "no Q-Former tokenizer": (
        lambda folder: shutil.rmtree(folder / "qformer_tokenizer"),
        "qformer_tokenizer: no usable tokenizer",
    ),
    "other image size": (
        with_json("processor_config.json", "image_processor", size={"height": 64, "width": 64}),
        "64 x 64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    harm, named = FAULTS[fault]
    assert_refused(folders["tiny"], tmp_path / "damaged", harm, named, load, monkeypatch)


def test_another_size_of_the_same_family_is_an_error(folders: Folders, tmp_path: Path) -> None:
    mixture = copied(folders["tiny"], tmp_path / "mixture", stored_tensors(folders["tiny-vicuna"]))
    with pytest.raises(CheckpointError, match="missing: .* surplus: .*language_model"):
        load(mixture)


def test_overrides_take_what_fits(folders: Folders) -> None:
    """One layer less in the Q-Former: the rest is loaded, what is left over is named."""
    options = ModelOptions(str(folders["tiny"]), None, "fp32", overrides={"qformer": {"layers": 1}})
    loaded = FAMILY.code.load(options, None)
    found = dict(loaded.model.named_parameters())
    wanted = stored_tensors(folders["tiny"])
    assert not any("layer.1." in name for name in found if name.startswith("qformer"))
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    one = example(loaded.processor, "a", "Which?", "5", [image(1)])
    with torch.no_grad():
        decoding.forward(FAMILY, loaded.model, FAMILY.code.collate([one], loaded.processor))
