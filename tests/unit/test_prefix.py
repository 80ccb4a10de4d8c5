"""A prefix of keys and values: what a cache that begins with it gives, in loss and in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from mmtrain import plugins
from mmtrain.assemble import Assembled, build_model
from mmtrain.config.schema import ComponentConfig, GenerationConfig
from mmtrain.errors import ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import BatchSize
from mmtrain.peft.trainable import make_trainable
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from mmtrain.training.export import export_trained
from tests.soaks import cases
from tests.unit.llava_material import FAMILY, load, mixed, write_lively

TOKENS = 3
BLOCK = ComponentConfig(**{"mode": "peft", "method": "prefix", "tokens": TOKENS})
QUICK = ["llava-tiny", "instructblip-tiny-vicuna", "qwen_vl-tiny", "qwen2_vl-tiny-2.5"]
DECODERS = [*QUICK, "qwen2_vl-tiny", "qwen2_vl-tiny-3"]


def run_of(model: tuple[str, str], **sections: Any) -> Any:
    block = {"mode": "peft", "method": "prefix", "tokens": TOKENS}
    return resolve(
        {
            "model": {"family": model[0], "preset": model[1], "dtype": "fp32"},
            "components": {"llm": block},
            "optim": {"global_batch": 2, "micro_batch": 2},
            **sections,
        }
    )


def table_of(assembled: Assembled) -> torch.nn.Parameter:
    (table,) = assembled.trained_parameters().values()
    return table


@pytest.mark.parametrize("model", cases(QUICK, DECODERS))
def test_every_decoder_sees_its_prefix(model: str) -> None:
    family, preset = model.split("-", 1)
    assembled = build_model(run_of((family, preset)), None)
    size = BatchSize(samples=2, tokens=40, answer_tokens=6)
    batch = assembled.family.code.planned_batch(assembled.model.config, size)
    losses = []
    with torch.no_grad():
        for scale in (1.0, 2.0):
            table_of(assembled).mul_(scale)
            found = decoding.forward(assembled.family, assembled.model, batch)
            losses.append(found.per_sample_loss)
    assert torch.isfinite(losses[0]).all() and not torch.allclose(losses[0], losses[1], rtol=1e-4)


def test_the_loss_is_that_of_a_cache_that_begins_with_it(tmp_path: Path) -> None:
    folder = write_lively(tmp_path)
    loaded, other = load(folder), load(folder)
    batch = FAMILY.code.collate(mixed(loaded.processor), loaded.processor)
    with torch.no_grad():
        features = FAMILY.code.image_features(loaded.model, batch)
        embeds, tensors = decoding.embed(FAMILY, loaded.model, batch.tensors, features)
        trainable = make_trainable(other.model, FAMILY, {"llm": BLOCK}, 5)
        found = decoding.forward(FAMILY, other.model, batch).per_sample_loss
        (name,) = trainable.owner
        table = other.model.get_parameter(name)
        llm = loaded.model.model.language_model
        heads, layers = llm.config.num_key_value_heads, llm.config.num_hidden_layers
        cache = DynamicCache()
        for layer, part in enumerate(table.view(TOKENS, layers, 2, heads, -1).unbind(1)):
            key, value = (
                one.transpose(0, 1).expand(len(embeds), -1, -1, -1) for one in part.unbind(1)
            )
            cache.update(key, value, layer)
        hidden = llm(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        head = loaded.model.get_output_embeddings()
        wanted = decoding.answer_loss(hidden, head, tensors).per_sample_loss
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_peft_reads_the_export_and_gives_the_same(tmp_path: Path) -> None:
    folder = write_lively(tmp_path)
    ours, theirs = load(folder), load(folder)
    (attachment,) = make_trainable(ours.model, FAMILY, {"llm": BLOCK}, 5).attachments
    target, names = attachment.target, attachment.exported(attachment.added.trained)
    settings = attachment.method.export_config(target, attachment.options, str(folder))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = {key: ours.model.get_parameter(name).detach() for key, name in names.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    batch = FAMILY.code.collate(mixed(ours.processor), ours.processor)
    tensors = batch.tensors
    with torch.no_grad():
        found = decoding.forward(FAMILY, ours.model, batch).answer_loss_sum
        model = PeftModel.from_pretrained(theirs.model, str(tmp_path))
        keys = ("input_ids", "attention_mask", "pixel_values")
        logits = model(**{key: tensors[key] for key in keys}).logits
        picked = logits.flatten(0, 1)[tensors["answer_positions"]]
        wanted = torch.nn.functional.cross_entropy(
            picked, tensors["answer_targets"], reduction="sum"
        )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_a_projection_is_trained_and_what_it_makes_is_stored(tmp_path: Path) -> None:
    """Trained counts are the released code's, stored ones those of the paper's table."""
    llm = {"mode": "peft", "method": "prefix", "projection": True}
    report = examine(run_of(("llava", "llava-1.5-7b"), components={"llm": llm}), world_size=1)
    part = report["components"]["llm"]
    assert (part["trainable_params"], part["stored_params"]) == (1_090_867_200, 5_242_880)
    small = {"llm": llm | {"tokens": TOKENS}}
    config = run_of(("llava", "tiny"), components=small)
    assembled = build_model(config, None)
    trained = {name: p.detach() for name, p in assembled.trained_parameters().items()}
    save_file(trained, tmp_path / "trainable.safetensors")
    export_trained(tmp_path, tmp_path, config, assembled)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    plain = build_model(run_of(("llava", "tiny")), None)
    with torch.no_grad():
        table_of(plain).copy_(tensors["prompt_embeddings"])
        losses = []
        for one in (assembled, plain):
            size = BatchSize(samples=2, tokens=40, answer_tokens=6)
            batch = one.family.code.planned_batch(one.model.config, size)
            losses.append(decoding.forward(one.family, one.model, batch).per_sample_loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_the_same_alone_and_in_a_batch(tmp_path: Path, beams: int) -> None:
    loaded = load(write_lively(tmp_path))
    examples = mixed(loaded.processor)
    settings = GenerationConfig(max_new_tokens=5, num_beams=beams)
    plain = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, settings)
    make_trainable(loaded.model, FAMILY, {"llm": BLOCK}, 5)
    ask = (FAMILY, loaded.model, loaded.processor)
    together = decoding.generate(*ask, examples, settings)
    assert together == [decoding.generate(*ask, [one], settings)[0] for one in examples]
    assert together != plain
    if beams == 1:
        assert_greedy(loaded, examples[0], together[0])


def assert_greedy(loaded: Any, example: Any, text: str) -> None:
    """The first token is the likeliest behind the prompt, by the forward of training."""
    batch = FAMILY.code.collate([example], loaded.processor, generating=True)
    with torch.no_grad():
        hidden, _ = decoding.hidden_states(FAMILY, loaded.model, batch)
        token = loaded.model.get_output_embeddings()(hidden[:, -1]).argmax(-1)
    first = loaded.processor.tokenizer.decode(token, skip_special_tokens=True).strip()
    assert text.startswith(first)


@pytest.mark.parametrize(
    ("model", "sections", "wanted"),
    [
        (("instructblip", "tiny"), {}, "components.llm.method: 'prefix' needs a decoder alone"),
        (
            ("llava", "tiny"),
            {"parallel": {"activation_checkpointing": True}},
            "components.llm.method: 'prefix' is lost where activations are recomputed",
        ),
        (
            ("llava", "tiny"),
            {"components": {"vision": {"mode": "peft", "method": "prefix"}}},
            "components.vision.method: 'prefix' goes before the tokens of a language model",
        ),
        (
            ("llava", "tiny"),
            {"components": {"llm": {"mode": "peft", "method": "prefix", "layers": "first-1"}}},
            "components.llm.method: 'prefix' goes before all layers; leave out 'layers'",
        ),
    ],
)
def test_where_it_cannot_go_it_says_so(
    model: tuple[str, str], sections: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of(model, **sections), world_size=1)


def test_every_decoder_is_tried() -> None:
    tiny = {
        f"{family}-{preset}"
        for family in plugins.names("family")
        for preset in plugins.load("family", family).presets
        if preset.startswith("tiny")
    }
    assert tiny - set(DECODERS) == {"instructblip-tiny"}
