"""LLaVA's forward and generation against transformers' own, sample by sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import save_file

from mmtrain.errors import DataError
from mmtrain.models import decoding
from mmtrain.models.interface import Example, LoadedModel
from tests.unit.folder_faults import stored_tensors
from tests.unit.llava_material import (
    FAMILY,
    GREEDY,
    example,
    image,
    load,
    logits_of,
    mixed,
    write_lively,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def alone(reference: Any, one: Example, length: int | None = None) -> torch.Tensor:
    """transformers' logits of one unpadded sample."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([one.input_ids[:length]])}
    if one.pixels:
        inputs["pixel_values"] = torch.stack(list(one.pixels))
    with torch.no_grad():
        return reference(**inputs).logits[0]


def test_logits_of_a_mixed_batch_equal_transformers(loaded: LoadedModel, reference: Any) -> None:
    examples = mixed(loaded.processor)
    batch = FAMILY.code.collate(examples, loaded.processor)
    with torch.no_grad():
        ours = logits_of(loaded.model, batch)
    for row, one in enumerate(examples):
        wanted = alone(reference, one)
        assert wanted.abs().max() > 0.5, "weights too small to tell anything"
        difference = (ours[row, : len(one.input_ids)] - wanted).abs().max()
        assert difference <= TOLERANCE * wanted.abs().max(), (one.id, float(difference))


def test_loss_is_the_sum_over_answer_tokens(loaded: LoadedModel, reference: Any) -> None:
    examples = mixed(loaded.processor)
    batch = FAMILY.code.collate(examples, loaded.processor)
    with torch.no_grad():
        result = decoding.forward(FAMILY, loaded.model, batch)
    wanted = []
    for one in examples:
        logits, labels = alone(reference, one)[:-1], torch.tensor(one.labels[1:])
        wanted.append(functional.cross_entropy(logits, labels, reduction="sum"))
    assert torch.allclose(result.per_sample_loss, torch.stack(wanted), rtol=TOLERANCE)
    assert float(result.answer_loss_sum) == pytest.approx(float(sum(wanted)), rel=TOLERANCE)
    answers = sum(label != -100 for one in examples for label in one.labels)
    assert int(result.per_sample_tokens.sum()) == batch.num_answer_tokens == answers


def test_images_count(loaded: LoadedModel) -> None:
    losses = []
    for number in (1, 2):
        one = example(loaded.processor, "a", "Which?", "5", [image(number)])
        with torch.no_grad():
            result = decoding.forward(
                FAMILY, loaded.model, FAMILY.code.collate([one], loaded.processor)
            )
        losses.append(float(result.answer_loss_sum))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_padding_samples_run_but_change_nothing(loaded: LoadedModel) -> None:
    from dataclasses import replace

    examples = mixed(loaded.processor)
    padded = [*examples, replace(examples[0], weight=0.0)]
    plain = FAMILY.code.collate(examples, loaded.processor)
    batch = FAMILY.code.collate(padded, loaded.processor)
    assert batch.num_answer_tokens == plain.num_answer_tokens
    assert batch.num_tokens == plain.num_tokens
    with torch.no_grad():
        found = decoding.forward(FAMILY, loaded.model, batch)
        wanted = decoding.forward(FAMILY, loaded.model, plain)
    assert float(found.per_sample_loss[-1]) == 0.0
    assert float(found.answer_loss_sum) == pytest.approx(float(wanted.answer_loss_sum), rel=1e-6)


@pytest.mark.parametrize("beams", [1, 2])
def test_batched_generation_equals_one_by_one(loaded: LoadedModel, beams: int) -> None:
    from types import SimpleNamespace

    settings = SimpleNamespace(**{**vars(GREEDY), "num_beams": beams})
    examples = mixed(loaded.processor)
    together = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, settings)
    single = [
        decoding.generate(FAMILY, loaded.model, loaded.processor, [one], settings)[0]
        for one in examples
    ]
    assert together == single
    assert len(set(together)) > 1 and any(together), together


def test_generation_equals_transformers_own(loaded: LoadedModel, reference: Any) -> None:
    from mmtrain.models.text import prompt_ids

    for one in mixed(loaded.processor):
        prompt = prompt_ids(one.input_ids, one.labels)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt])}
        if one.pixels:
            inputs["pixel_values"] = torch.stack(list(one.pixels))
        tokenizer = loaded.processor.tokenizer
        out = reference.generate(
            **inputs,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        wanted = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()
        assert decoding.generate(FAMILY, loaded.model, loaded.processor, [one], GREEDY) == [wanted]


def test_unpadded_vocabulary(folder: Path, reference: Any, tmp_path: Path) -> None:
    """The image token's id is the vocabulary's size: it has no embedding and no logit."""
    target = tmp_path / "unpadded"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    tensors = stored_tensors(folder)
    size = config["image_token_index"]
    assert size == config["text_config"]["vocab_size"] - 1
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        tensors[name] = tensors[name][:size].contiguous()
    config["text_config"]["vocab_size"] = size
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    unpadded = load(target)
    examples = mixed(unpadded.processor)
    batch = FAMILY.code.collate(examples, unpadded.processor)
    assert int(batch.tensors["input_ids"].max()) == size
    with torch.no_grad():
        ours = logits_of(unpadded.model, batch)
    for row, one in enumerate(examples):
        wanted = alone(reference, one)[:, :size]
        difference = (ours[row, : len(one.input_ids)] - wanted).abs().max()
        assert difference <= TOLERANCE * wanted.abs().max()
    answers = decoding.generate(FAMILY, unpadded.model, unpadded.processor, examples, GREEDY)
    assert len(answers) == len(examples)


def test_a_image_token_in_the_text_is_an_error_naming_the_sample(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="sample odd.*<image>"):
        example(loaded.processor, "odd", "What does <image> mean?", "5", [image(1)])
