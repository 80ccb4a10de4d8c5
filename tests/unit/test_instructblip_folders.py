"""InstructBLIP folders as people have them: every layout loads, every fault is one named error."""

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
from mmtrain.models.interface import ModelOptions
from tests.unit.instructblip_material import (
    FAMILY,
    GREEDY,
    TEXTS,
    TWINS,
    example,
    load,
    mixed,
    our_logits,
    picture,
    reference_logits,
    reference_of,
    stored_tensors,
    write_lively,
)

Tensors = dict[str, torch.Tensor]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = tmp_path_factory.mktemp("instructblip")
    return {preset: write_lively(base, preset) for preset in TWINS}


@pytest.fixture(params=TWINS)
def folder(request: pytest.FixtureRequest, folders: Folders) -> Path:
    return folders[request.param]


def copied(folder: Path, target: Path, tensors: Tensors | None = None) -> Path:
    """A copy of the folder, with other weights if they are given."""
    shutil.copytree(folder, target)
    if tensors is not None:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
            batch = FAMILY.collate([one], loaded.processor)
            logits = reference_logits(reference, loaded.processor, one)
            labels = torch.tensor(one.labels)
            wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = FAMILY.forward(loaded.model, batch).answer_loss_sum
            assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_bf16_loads_the_rounded_weights_everywhere(folder: Path) -> None:
    wanted = stored_tensors(folder)
    loaded = load(folder, dtype="bf16")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, wanted[name].to(torch.bfloat16)), name
    with torch.no_grad():
        examples = mixed(loaded.processor)
        result = FAMILY.forward(loaded.model, FAMILY.collate(examples, loaded.processor))
    assert torch.isfinite(result.answer_loss_sum)
    assert FAMILY.generate(loaded.model, loaded.processor, examples, GREEDY)


def test_saved_folders_load_here_and_in_transformers(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    state = {name: parameter.detach() + 0.01 for name, parameter in loaded.model.named_parameters()}
    FAMILY.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    assert_loads(tmp_path / "saved", state)
    reference, again = reference_of(tmp_path / "saved"), load(tmp_path / "saved")
    theirs = dict(reference.named_parameters())
    assert all(torch.equal(theirs[name], state[name]) for name in state)
    examples = mixed(again.processor)
    with torch.no_grad():
        ours = our_logits(again.model, FAMILY.collate(examples, again.processor))
    wanted = [reference_logits(reference, again.processor, one) for one in examples]
    assert (ours - torch.cat(wanted)).abs().max() <= 1e-5


def test_older_folders_know_no_picture_token(folder: Path, tmp_path: Path) -> None:
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
            FAMILY.forward(one.model, FAMILY.collate(given, one.processor))
            for one, given in zip((then, now), examples, strict=True)
        ]
    assert torch.equal(results[0].per_sample_loss, results[1].per_sample_loss)


def test_tiny_checkpoints_repeat(tmp_path: Path) -> None:
    for preset in TWINS:
        for name in "ab":
            FAMILY.write_tiny(tmp_path / preset / name, TEXTS, 5, preset)
        files = {
            path.relative_to(tmp_path / preset / "a")
            for path in (tmp_path / preset / "a").rglob("*")
            if path.is_file()
        }
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {str(f) for f in files}
        for file in files:
            first, second = (tmp_path / preset / name / file for name in "ab")
            assert first.read_bytes() == second.read_bytes(), file


def test_tiny_twins_keep_the_published_dropout(tmp_path: Path) -> None:
    FAMILY.write_tiny(tmp_path, TEXTS, 0, "tiny")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["qformer_config"]["hidden_dropout_prob"] == 0.1
    assert stored["text_config"]["dropout_rate"] == 0.1


# --- faults: (what is done to a copy of the folder, what the error must name) ---------------------


def _edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_part(folder: Path, part: str, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: {**config[part], **values}})


def _missing_keys(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in ("query_tokens", "qformer.encoder.layer.1.output_query.dense.bias"):
            del tensors[name]

    _edit_weights(folder, change)


def _wrong_shape(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["query_tokens"] = tensors["query_tokens"][:, :-1].contiguous()

    _edit_weights(folder, change)


def _other_tokenizer(folder: Path) -> None:
    from mmtrain.models.families.instructblip import tiny_twin

    tiny_twin.t5_tokenizer(["another text altogether"]).save_pretrained(folder)


def _larger_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(99)])
    tokenizer.save_pretrained(folder)


def _larger_qformer_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder / "qformer_tokenizer")


def _other_picture_size(folder: Path) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 64, "width": 64}
    (folder / "processor_config.json").write_text(json.dumps(processor))


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong family": (
        lambda folder: edit_json(folder / "config.json", model_type="blip-2"),
        "is a 'blip-2' checkpoint, not 'instructblip'",
    ),
    "other language model": (
        lambda folder: edit_json(folder / "config.json", text_config={"model_type": "opt"}),
        "its language model is 'opt'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config of wrong types": (
        lambda folder: _edit_part(folder, "qformer_config", hidden_size="wide"),
        "not a configuration of 'instructblip'",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no weights there: neither model.safetensors",
    ),
    "missing keys": (
        _missing_keys,
        "2 missing: qformer.encoder.layer.1.output_query.dense.bias, query_tokens",
    ),
    "surplus keys": (
        lambda folder: _edit_weights(
            folder, lambda tensors: tensors.update({"qformer.cls.bias": torch.ones(3)})
        ),
        "1 surplus: qformer.cls.bias",
    ),
    "wrong shape": (_wrong_shape, r"query_tokens is \[1, 7, 64\] in the file, \[1, 8, 64\]"),
    "cut short": (_cut_short, "model.safetensors: damaged or cut short"),
    "other tokenizer": (_other_tokenizer, "the tokenizer gives <image> the id"),
    "larger tokenizer": (_larger_tokenizer, "the tokenizer has [0-9]+ tokens, config.json says"),
    "larger Q-Former tokenizer": (
        _larger_qformer_tokenizer,
        "the Q-Former's tokenizer has [0-9]+ tokens",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "damaged: no usable tokenizer",
    ),
    "no Q-Former tokenizer": (
        lambda folder: shutil.rmtree(folder / "qformer_tokenizer"),
        "qformer_tokenizer: no usable tokenizer",
    ),
    "other picture size": (_other_picture_size, "64 x 64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_and_nothing_is_loaded(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    damaged = copied(folders["tiny"], tmp_path / "damaged")
    harm, named = FAULTS[fault]
    harm(damaged)
    written: list[Any] = []
    monkeypatch.setattr(weights, "write_parameter", lambda *given: written.append(given))
    with pytest.raises(CheckpointError, match=named) as caught:
        load(damaged)
    assert str(damaged) in str(caught.value) and caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not written


def test_another_size_of_the_same_family_is_an_error(folders: Folders, tmp_path: Path) -> None:
    mixture = copied(folders["tiny"], tmp_path / "mixture", stored_tensors(folders["tiny-vicuna"]))
    with pytest.raises(CheckpointError, match="missing: .* surplus: .*language_model"):
        load(mixture)


def test_overrides_take_what_fits(folders: Folders) -> None:
    """One layer less in the Q-Former: the rest is loaded, what is left over is named."""
    options = ModelOptions(str(folders["tiny"]), None, "fp32", overrides={"qformer": {"layers": 1}})
    loaded = FAMILY.load(options, None)
    found = dict(loaded.model.named_parameters())
    wanted = stored_tensors(folders["tiny"])
    assert not any("layer.1." in name for name in found if name.startswith("qformer"))
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    one = example(loaded.processor, "a", "Which?", "5", [picture(1)])
    with torch.no_grad():
        FAMILY.forward(loaded.model, FAMILY.collate([one], loaded.processor))
