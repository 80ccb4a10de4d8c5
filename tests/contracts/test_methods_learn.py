"""What every method promises of training: it learns by looking, and changes nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtrain import plugins
from mmtrain.assemble import Assembled, build_model, build_source
from mmtrain.models import decoding, encoding
from mmtrain.models.interface import Batch, Example
from mmtrain.models.other_answers import shared_prompts
from mmtrain.resolve import resolve
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny
from tests.contracts.test_methods import KINDS, REFUSED, TINY_MODELS, block_of, fits, place_of
from tests.soaks import cases

SAMPLES, STEPS = 16, 600
# How many of the 16 are right, of their ten answers; with another's image, four see their digit.
LEARNT, GUESSED = 15, 8
# Per method where it is not the usual one: scales and learned tokens move by steps of its size.
LR = {"ia3": 3e-2, "prefix": 3e-2, "llama_adapter": 5e-3, "maple": 3e-3, "petal": 5e-3}
FIRST = list({family: (family, preset) for family, preset in reversed(TINY_MODELS)}.values())
PAIRS = [
    (name, *one)
    for name in plugins.names("method")
    for one in FIRST
    if fits(name, one[0]) and (name, *one) not in REFUSED
]
QUICK = [pair for pair in PAIRS if pair[:2] == ("petal", "instructblip")]


def trained(
    family: str, preset: str, components: dict[str, Any], root: Path, digits: Path
) -> tuple[Assembled, Batch]:
    """A tiny model with what is asked for attached, and 16 digits as one batch."""
    code = plugins.load("family", family).code
    code.write_tiny(root / "base", tiny.DIGITS_TEXTS, seed=0, preset=preset)
    model = {"family": family, "checkpoint": str(root / "base"), "dtype": "fp32"}
    data = {"task": "digits", "train": str(digits / "train")}
    optim = {"global_batch": SAMPLES, "micro_batch": SAMPLES}
    run = {"model": model, "components": components, "data": data, "optim": optim}
    config = resolve(run)
    assembled = build_model(config, None)
    source = build_source(config, assembled, str(digits / "train"), SAMPLES)
    batch = code.collate([source.example(n) for n in range(SAMPLES)], assembled.processor)
    return assembled, batch


def steps(assembled: Assembled, batch: Batch, lr: float, count: int) -> float:
    """Plain AdamW; the loss at the end."""
    optimizer = torch.optim.AdamW(assembled.trained_parameters().values(), lr=lr, weight_decay=0.0)
    for step in range(count):
        optimizer.zero_grad()
        found = decoding.forward(assembled.family, assembled.model, batch)
        auxiliary = assembled.trainable.auxiliary
        weighted = [weight * found.auxiliary[name] for name, weight in auxiliary.items()]
        sum(weighted, found.answer_loss_sum / SAMPLES).backward()
        optimizer.step()
        if step % 25 == 24 and num_right(assembled, batch) == SAMPLES:
            break
    return float(found.answer_loss_sum)


def num_right(assembled: Assembled, batch: Batch, moved: int = 0) -> int:
    """Samples whose digit is the likeliest of all answers, each with the image `moved` behind."""
    family, model = assembled.family, assembled.model
    with torch.no_grad():
        features = family.code.image_features(model, batch)
        rows = features.tokens.reshape(SAMPLES, -1, features.tokens.shape[-1]).roll(moved, 0)
        features = replace(features, tokens=rows.reshape(features.tokens.shape))
        hidden, tensors = decoding.hidden_states(family, model, batch, features)
        flat = hidden.reshape(-1, hidden.shape[-1])
        # The first token of each answer.
        first = (tensors["answer_rows"].diff(prepend=torch.tensor([-1])) != 0).nonzero().squeeze(1)
        head = family.code.decoder(model).get_output_embeddings()
        logits = head(flat[tensors["answer_positions"][first]])
    targets = tensors["answer_targets"][first]
    answers = targets.unique()
    return int((answers[logits[:, answers].argmax(-1)] == targets).sum())


@pytest.mark.parametrize(("name", "family", "preset"), cases(QUICK, PAIRS))
def test_a_method_learns_by_looking(
    name: str, family: str, preset: str, tmp_path: Path, digit_shards: Path
) -> None:
    """Beside whatever stands between tower and language model, trained in full."""
    found = plugins.load("family", family)
    full = {one: {"mode": "full"} for one in found.components if one not in found.sublayers}
    block = {"mode": "peft", **block_of(name)}
    components = {**full, place_of(name): block}
    assembled, batch = trained(family, preset, components, tmp_path, digit_shards)
    # Embeddings and head that train in full, as Qwen-VL's do here, bear no rate above this.
    most = 3e-3 if "embeddings" in full else 1.0
    steps(assembled, batch, min(most, LR.get(name, 1e-3)), STEPS)
    assert num_right(assembled, batch) >= LEARNT
    assert num_right(assembled, batch, moved=5) <= GUESSED


@pytest.mark.parametrize(("family", "preset"), KINDS)
@pytest.mark.parametrize("name", plugins.names("method"))
def test_what_is_frozen_stays_bit_equal(
    name: str, family: str, preset: str, tmp_path: Path, digit_shards: Path
) -> None:
    if not fits(name, family) or (name, family, preset) in REFUSED:
        return  # said by test_a_method_says_what_it_added
    components = {place_of(name): {"mode": "peft", **block_of(name)}}
    assembled, batch = trained(family, preset, components, tmp_path, digit_shards)
    parameters = assembled.trained_parameters()
    before = {n: p.detach().clone() for n, p in assembled.model.named_parameters()}
    steps(assembled, batch, 1e-3, 20)
    for parameter_name, parameter in assembled.model.named_parameters():
        same = torch.equal(parameter, before[parameter_name])
        assert same == (parameter_name not in parameters), parameter_name
    prompts_can_be_shared(assembled)


def prompts_can_be_shared(assembled: Assembled) -> None:
    """Other answers behind a prompt that ran cost what they cost alone, whatever was learnt."""
    family, processor, model = assembled.family, assembled.processor, assembled.model.eval()

    def asked(answer: str) -> Batch:
        rendered = (
            Rendered((Turn("user", one),), answer) for one in ("Which?", "Which digit? " * 3)
        )
        images = [Image.new("RGB", (8, 8), "red")]
        examples = [
            encoding.encode(family, processor, f"{n}", one, images[n:], 2000, "left")
            for n, one in enumerate(rendered)
        ]
        answered.append(examples)
        return family.code.collate(examples, processor)

    answered: list[list[Example]] = []
    batches = [asked("5"), asked("7 and 8"), asked("2")]
    shared = shared_prompts(answered, processor.image_token_id)
    assert shared is not None
    with torch.no_grad():
        for batch in batches:
            wanted = decoding.forward(family, model, batch).per_sample_loss
            found = decoding.forward(family, model, batch, None, shared).per_sample_loss
            assert torch.allclose(found, wanted, rtol=1e-5)


def test_lora_on_the_qformer_lives(tmp_path: Path, digit_shards: Path) -> None:
    """Published code once left both of its matrices at zero, and rank changed nothing."""
    losses = {}
    for rank in (0, 1, 2):
        components: dict[str, Any] = {"projection": {"mode": "full"}}
        if rank:
            lora = {"mode": "peft", "method": "lora", "sublayers": ["self_attn"], "r": rank}
            components["qformer"] = lora
        folder = tmp_path / str(rank)
        assembled, batch = trained("instructblip", "tiny", components, folder, digit_shards)
        adapter = {n: p for n, p in assembled.trained_parameters().items() if "lora_" in n}
        assert bool(adapter) == bool(rank)
        assert all(bool(p.any()) == ("lora_A" in n) for n, p in adapter.items())
        losses[rank] = steps(assembled, batch, 1e-2, 5)
        assert all(bool(p.any()) for p in adapter.values()), "a matrix never moved"
    assert len(set(losses.values())) == 3, losses
