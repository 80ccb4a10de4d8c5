"""What one decoder path promises of every family: masks, taps, prompts, images seen once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmtrain.models import decoding
from mmtrain.models.interface import Batch, ForwardResult
from mmtrain.models.taps import taps_of
from tests.contracts.tiny_models import SETTINGS, TinyModel

ROUNDING = 2e-5


class Prompts(nn.Module):
    """Three learnt embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(3, width, generator=torch.Generator().manual_seed(1))
        )

    def forward(self) -> torch.Tensor:
        return self.weight


def batch_of(one: TinyModel) -> Batch:
    return one.family.code.collate(one.samples(), one.loaded().processor)


def loss_of(one: TinyModel, model: Any, **more: Any) -> ForwardResult:
    return decoding.forward(one.family, model, batch_of(one), **more)


def test_causal_training_makes_no_mask(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []
    attention = nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *others: Any, **given: Any) -> torch.Tensor:
        if given.get("is_causal"):
            masks.append(given.get("attn_mask"))
        return attention(query, *others, **given)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    loaded = tiny_model.loaded()
    with torch.no_grad():
        loss_of(tiny_model, loaded.model)
    # T5's decoder adds positions to its scores, by a mask of its own.
    is_t5 = getattr(getattr(loaded.config, "text_config", None), "model_type", "") == "t5"
    assert is_t5 or masks
    assert all(mask is None for mask in masks)


def test_images_seen_once_serve_loss_and_answers(tiny_model: TinyModel) -> None:
    loaded, code = tiny_model.loaded(), tiny_model.family.code
    samples = tiny_model.samples()
    with torch.no_grad():
        features = code.image_features(loaded.model, batch_of(tiny_model))
        found = loss_of(tiny_model, loaded.model, features=features)
        wanted = loss_of(tiny_model, loaded.model)
    assert torch.equal(found.per_sample_loss, wanted.per_sample_loss)
    answers = tiny_model.answers(loaded.model, samples, features=features)
    assert answers == tiny_model.answers(loaded.model, samples)


def test_losses_and_tokens_are_told_per_sample(tiny_model: TinyModel) -> None:
    batch = batch_of(tiny_model)
    with torch.no_grad():
        found = loss_of(tiny_model, tiny_model.loaded().model)
    assert len(found.per_sample_tokens) == len(found.per_sample_loss) == len(batch.ids)
    assert int(found.per_sample_tokens.sum()) == batch.num_answer_tokens
    assert found.per_sample_loss.sum() == pytest.approx(float(found.answer_loss_sum), rel=1e-6)


def test_every_tap_shows_and_changes_what_passes(tiny_model: TinyModel) -> None:
    assert {"vision_tokens", "connector_output"} <= set(tiny_model.family.taps)
    for name, tap in tiny_model.family.taps.items():
        model = tiny_model.load().model
        with torch.no_grad():
            before = loss_of(tiny_model, model).answer_loss_sum
            seen: list[torch.Tensor] = []
            taps_of(model).listen(tap, seen.append)
            assert torch.equal(loss_of(tiny_model, model).answer_loss_sum, before), name
            assert len(seen) == 1 and seen[0].is_floating_point(), name
            taps_of(model).listen(tap, lambda shown: shown.flip(-1))
            assert not torch.equal(loss_of(tiny_model, model).answer_loss_sum, before), name


def test_prompts_stand_before_every_row(tiny_model: TinyModel) -> None:
    code, model = tiny_model.family.code, tiny_model.load().model
    prompts = Prompts(code.decoder(model).get_input_embeddings().weight.shape[1])
    samples = tiny_model.samples()
    plain = tiny_model.losses(model, samples)
    taps_of(model).insert_prompts(prompts)
    together = tiny_model.losses(model, samples)
    assert not torch.allclose(together, plain, rtol=1e-3)
    # Each alone, and padded in a batch: nothing that counts a row's tokens is out of step.
    alone = torch.cat([tiny_model.losses(model, [one]) for one in samples])
    assert torch.allclose(together, alone, rtol=ROUNDING)
    answers = tiny_model.answers(model, samples)
    assert answers == [tiny_model.answers(model, [one])[0] for one in samples]
    loss_of(tiny_model, model).answer_loss_sum.backward()
    assert prompts.weight.grad is not None and float(prompts.weight.grad.abs().min(1).values[0]) > 0


def test_a_further_loss_reads_the_batch(tiny_model: TinyModel) -> None:
    model = tiny_model.load().model
    taps_of(model).add_loss("count", lambda tensors: tensors["answer_targets"].sum())
    with torch.no_grad():
        found = loss_of(tiny_model, model).auxiliary
    assert found == {"count": batch_of(tiny_model).tensors["answer_targets"].sum()}


class Watched:
    """An object with some other attributes."""

    def __init__(self, one: Any, **others: Any) -> None:
        self.one = one
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.one, name)


def test_no_answer_ends_before_its_least_length(tiny_model: TinyModel) -> None:
    """Whatever would come first is made the end: it comes when it may."""
    model, processor = tiny_model.loaded().model, tiny_model.loaded().processor
    tokenizer = Watched(
        processor.tokenizer,
        batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows.tolist()],
    )

    def said(stop_ids: tuple[int, ...], least: int) -> list[int]:
        settings = {**vars(SETTINGS), "min_new_tokens": least}
        watched: Any = Watched(processor, tokenizer=tokenizer, stop_ids=stop_ids)
        one = tiny_model.samples()[:1]
        shown = decoding.generate(
            tiny_model.family, model, watched, one, SimpleNamespace(**settings)
        )
        return [int(number) for number in shown[0].split()]

    free = said(processor.stop_ids, SETTINGS.max_new_tokens)
    start = free[: len(free) - SETTINGS.max_new_tokens]  # T5's decoder has a token to start from
    stop = (free[len(start)],)
    assert said(stop, 0)[len(start) :] == [*stop]
    held = said(stop, 3)[len(start) :]
    assert len(held) >= 3 and stop[0] not in held[:3]
