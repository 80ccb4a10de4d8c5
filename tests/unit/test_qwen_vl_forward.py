"""Qwen-VL's forward against a plain recomputation, sample by sample, short and beyond length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from mmtrain.models import decoding
from mmtrain.models.interface import Example, LoadedModel
from tests.unit import qwen_vl_plain as plain
from tests.unit.folder_faults import stored_tensors
from tests.unit.qwen_vl_material import (
    FAMILY,
    GREEDY,
    TOLERANCE,
    example,
    image,
    load,
    logits_of,
    mixed,
    write_lively,
)

# The samples have 40 to 90 tokens: some within, some beyond one, two and more times this length.
SHORT_LENGTH = 24


class TinyModel:
    """A folder, loaded by the family and read plainly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: LoadedModel = load(folder)
        self.tensors = stored_tensors(folder)
        self.config = json.loads((folder / "config.json").read_text())

    def wanted(self, one: Example) -> torch.Tensor:
        """The plain logits of one sample."""
        return plain.logits(self.tensors, self.config, one.input_ids, one.pixels)


@pytest.fixture(scope="module", params=[2048, SHORT_LENGTH], ids=["usual", "beyond"])
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> TinyModel:
    return TinyModel(write_lively(tmp_path_factory.mktemp("qwen_vl"), seq_length=request.param))


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_a_mixed_batch_equal_the_plain_ones(tiny_model: TinyModel, side: str) -> None:
    examples = mixed(tiny_model.loaded.processor)
    for one, ours in zip(examples, logits_of(tiny_model.loaded, examples, side), strict=True):
        wanted = tiny_model.wanted(one)
        assert wanted.abs().max() > 0.5, "weights too small to tell anything"
        difference = (ours - wanted).abs().max()
        assert difference <= TOLERANCE * wanted.abs().max(), (one.id, float(difference))


def test_lengths_beyond_training_change_the_logits(tiny_model: TinyModel) -> None:
    one = mixed(tiny_model.loaded.processor)[0]
    usual = plain.logits(
        tiny_model.tensors, {**tiny_model.config, "seq_length": 2048}, one.input_ids, one.pixels
    )
    same = torch.allclose(tiny_model.wanted(one), usual, atol=1e-3)
    assert same == (tiny_model.config["seq_length"] == 2048)


def test_loss_is_the_sum_over_answer_tokens(tiny_model: TinyModel) -> None:
    examples = mixed(tiny_model.loaded.processor)
    batch = FAMILY.code.collate(examples, tiny_model.loaded.processor)
    with torch.no_grad():
        result = decoding.forward(FAMILY, tiny_model.loaded.model, batch)
    wanted = []
    for one in examples:
        logits, labels = tiny_model.wanted(one)[:-1], torch.tensor(one.labels[1:])
        wanted.append(functional.cross_entropy(logits, labels, reduction="sum"))
    assert torch.allclose(result.per_sample_loss, torch.stack(wanted), rtol=TOLERANCE)
    assert float(result.answer_loss_sum) == pytest.approx(float(sum(wanted)), rel=TOLERANCE)
    answers = sum(label != -100 for one in examples for label in one.labels)
    assert int(result.per_sample_tokens.sum()) == batch.num_answer_tokens == answers


def test_training_sees_what_evaluation_sees(tiny_model: TinyModel) -> None:
    batch = FAMILY.code.collate(mixed(tiny_model.loaded.processor), tiny_model.loaded.processor)
    model = tiny_model.loaded.model
    with torch.no_grad():
        evaluated = decoding.forward(FAMILY, model.eval(), batch).per_sample_loss
        trained = decoding.forward(FAMILY, model.train(), batch).per_sample_loss
    model.eval()
    assert torch.equal(trained, evaluated)


def test_eager_attention_is_the_same(tiny_model: TinyModel) -> None:
    examples = mixed(tiny_model.loaded.processor)
    eager = load(tiny_model.folder, attention="eager")
    for side in ("left", "right"):
        pairs = zip(logits_of(eager, examples, side), logits_of(tiny_model.loaded, examples, side))
        for found, wanted in pairs:
            assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    answers = decoding.generate(FAMILY, eager.model, eager.processor, examples, GREEDY)
    usual = tiny_model.loaded
    assert answers == decoding.generate(FAMILY, usual.model, usual.processor, examples, GREEDY)


def test_images_count_each_in_its_place(tiny_model: TinyModel) -> None:
    processor = tiny_model.loaded.processor

    def loss(*numbers: int) -> float:
        one = example(processor, "a", "Which?", "5", [image(number) for number in numbers])
        with torch.no_grad():
            result = decoding.forward(
                FAMILY, tiny_model.loaded.model, FAMILY.code.collate([one], processor)
            )
        return float(result.answer_loss_sum)

    losses = [loss(1, 2), loss(2, 1), loss(1, 3)]
    assert min(abs(a - b) for a in losses for b in losses if a is not b) > 1e-3


def test_padding_samples_run_but_change_nothing(tiny_model: TinyModel) -> None:
    loaded = tiny_model.loaded
    examples = mixed(loaded.processor)
    padded = [*examples, replace(examples[0], weight=0.0)]
    batch = FAMILY.code.collate(padded, loaded.processor)
    with torch.no_grad():
        found = decoding.forward(FAMILY, loaded.model, batch)
        wanted = decoding.forward(
            FAMILY, loaded.model, FAMILY.code.collate(examples, loaded.processor)
        )
    assert float(found.per_sample_loss[-1]) == 0.0
    assert float(found.answer_loss_sum) == pytest.approx(float(wanted.answer_loss_sum), rel=1e-6)


def test_recomputed_activations_give_the_same_gradients(tiny_model: TinyModel) -> None:
    batch = FAMILY.code.collate(mixed(tiny_model.loaded.processor), tiny_model.loaded.processor)

    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        model: Any = load(tiny_model.folder).model.train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.transformer.h[0].gradient_checkpointing
        decoding.forward(FAMILY, model, batch).answer_loss_sum.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plainly, recomputed = gradients(False), gradients(True)
    # The resampler's fixed positions ask for no gradient.
    assert [name for name, one in plainly.items() if one is None] == [
        "transformer.visual.attn_pool.pos_embed"
    ]
    for name, one in plainly.items():
        assert one is None or torch.equal(one, recomputed[name]), name
        assert one is None or bool(one.any()), f"{name}: no gradient reaches it"


@contextmanager
def readable_only_while_called(model: torch.nn.Module) -> Iterator[None]:
    """As under ZeRO-3: a module's own parameters are there while it runs, and only then."""
    handles = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        kept = {name: parameter.data for name, parameter in own.items()}

        def put(*_: Any, own: Any = own, kept: Any = kept) -> None:
            for name, parameter in own.items():
                parameter.data = kept[name]

        def take(*_: Any, own: Any = own) -> None:
            for parameter in own.values():
                parameter.data = torch.full_like(parameter.data, torch.nan)

        take()
        handles += [module.register_forward_pre_hook(put), module.register_forward_hook(take)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_parameters_are_read_only_while_their_module_runs(tiny_model: TinyModel) -> None:
    loaded = load(tiny_model.folder)
    examples = mixed(loaded.processor)
    batch = FAMILY.code.collate(examples, loaded.processor)
    usual = tiny_model.loaded
    with torch.no_grad(), readable_only_while_called(loaded.model):
        found = decoding.forward(FAMILY, loaded.model, batch).per_sample_loss
        answers = decoding.generate(FAMILY, loaded.model, loaded.processor, examples, GREEDY)
    with torch.no_grad():
        assert torch.equal(found, decoding.forward(FAMILY, usual.model, batch).per_sample_loss)
    assert answers == decoding.generate(FAMILY, usual.model, usual.processor, examples, GREEDY)
