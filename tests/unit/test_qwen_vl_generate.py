"""Qwen-VL's generation: cached as recomputed, batched as alone, also beyond the usual length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.models import decoding
from mmtrain.models.families.qwen_vl.lengths import logn_scale, ntk_alpha
from mmtrain.models.interface import Batch, Example, LoadedModel
from mmtrain.models.text import prompt_ids
from tests.unit import qwen_vl_plain as plain
from tests.unit.folder_faults import stored_tensors
from tests.unit.qwen_vl_material import (
    FAMILY,
    GREEDY,
    embeds_of,
    example,
    image,
    load,
    logits_of,
    mixed,
    write_lively,
)

SHORT_LENGTH = 24


@pytest.fixture(scope="module", params=[2048, SHORT_LENGTH], ids=["usual", "beyond"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return write_lively(tmp_path_factory.mktemp("qwen_vl"), seq_length=request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def plain_answer(folder: Path, loaded: LoadedModel, one: Example) -> list[int]:
    """The likeliest token, again and again, everything recomputed each time."""
    tensors, config = stored_tensors(folder), json.loads((folder / "config.json").read_text())
    ids = prompt_ids(one.input_ids, one.labels)
    answer: list[int] = []
    for _ in range(GREEDY.max_new_tokens):
        logits = plain.logits(tensors, config, [*ids, *answer], one.pixels, len(ids))
        answer.append(int(logits[-1].argmax()))
        if answer[-1] in loaded.processor.tokenizer.eos_token_id:
            break
    return answer


def test_cached_generation_equals_plain_recomputation(folder: Path, loaded: LoadedModel) -> None:
    tokenizer = loaded.processor.tokenizer
    examples = mixed(loaded.processor)
    wanted = [
        tokenizer.decode(plain_answer(folder, loaded, one), skip_special_tokens=True).strip()
        for one in examples
    ]
    assert decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY) == wanted
    assert len(set(wanted)) > 1 and any(wanted), wanted


@pytest.mark.parametrize("beams", [1, 3])
def test_batched_generation_equals_one_by_one(loaded: LoadedModel, beams: int) -> None:
    settings = SimpleNamespace(**{**vars(GREEDY), "num_beams": beams})
    examples = mixed(loaded.processor)
    together = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, settings)
    single = [
        decoding.generate(FAMILY, loaded.model, loaded.processor, [one], settings)[0]
        for one in examples
    ]
    assert together == single
    assert len(set(together)) > 1 and any(together), together


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_nothing(loaded: LoadedModel, beams: int) -> None:
    """Without one, transformers runs the whole text again for every token."""
    one = mixed(loaded.processor)[1]
    prompt = torch.tensor([prompt_ids(one.input_ids, one.labels)])
    model: Any = loaded.model
    found = [
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            row_lengths=torch.tensor([prompt.shape[1]]),
            max_new_tokens=8,
            num_beams=beams,
            do_sample=False,
            use_cache=cached,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*found) and found[0].shape[1] > prompt.shape[1]


def test_training_expects_what_generation_says(loaded: LoadedModel) -> None:
    """Prompt and answer lie between the same two steps of the rotary base."""
    processor = loaded.processor
    question = "Which digit is in the picture? Options: 0, 1, 2, 3"
    blank = example(processor, "a", question, "", [image(1)])
    prompt = prompt_ids(blank.input_ids, blank.labels)
    assert 2 * SHORT_LENGTH < len(prompt) and len(prompt) + 6 <= 4 * SHORT_LENGTH
    said = answer_ids(loaded, prompt, blank.pixels[0])
    answered = replace(blank, input_ids=[*prompt, *said])
    [logits] = logits_of(loaded, [answered], "right")
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == said


def answer_ids(loaded: LoadedModel, prompt: list[int], pixels: torch.Tensor) -> list[int]:
    """The tokens that generation says, though they spell no text."""
    model: Any = loaded.model
    ids = torch.tensor([prompt])
    with torch.no_grad():
        batch = Batch({"pixel_values": pixels[None]}, [], 0, 0)
        embeds = embeds_of(model, batch, ids, loaded.processor.image_token_id)
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        row_lengths=torch.tensor([len(prompt)]),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        pad_token_id=loaded.processor.tokenizer.pad_token_id,
    )
    return out[0].tolist()


def test_generation_stops_at_the_end_of_a_turn(loaded: LoadedModel) -> None:
    assert loaded.processor.tokenizer.eos_token_id == [
        loaded.processor.tokenizer.special[token]
        for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    ]


def test_length_rules_are_the_published_formulas() -> None:
    config = {"seq_length": 2048, "rotary_emb_base": 10000, "kv_channels": 128}
    lengths = [1, 17, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 8193, 32767]
    for length, alpha in zip(lengths, ntk_alpha(torch.tensor(lengths), 2048).tolist()):
        wanted = plain.rotary_base(config, length)
        assert 10000 * alpha ** (128 / 126) == pytest.approx(wanted, rel=1e-12), length
    scale = logn_scale(torch.arange(9000), 2048)
    assert torch.allclose(scale, plain.query_factors(config, 9000)[:, 0], rtol=1e-6)
    assert scale[2047] == 1 and scale[2048] > 1
