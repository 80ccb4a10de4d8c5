"""Forward and generation of Qwen2-VL, 2.5 and 3 against transformers' own, sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from mmtrain.models import decoding
from mmtrain.models.dropout import DropoutScope, KeyedDropout, scope_of, stable_hash
from mmtrain.models.families.qwen2_vl import batches
from mmtrain.models.interface import Example, LoadedModel
from mmtrain.models.text import prompt_ids
from tests.unit.qwen2_vl_material import (
    FAMILY,
    GREEDY,
    TINY,
    example,
    image,
    image_inputs,
    inputs_of,
    load,
    logits_of,
    mixed,
    reference,
    token_types,
    write_lively,
)

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Pair:
    """Our model of a folder, and transformers'."""

    ours: LoadedModel
    theirs: Any

    @property
    def model(self) -> Any:
        """Our model."""
        return self.ours.model

    @property
    def processor(self) -> Any:
        """The folder's processor."""
        return self.ours.processor


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("qwen2_vl") / request.param
    write_lively(folder, request.param)
    return Pair(load(folder), reference(folder, request.param))


def alone(pair: Pair, one: Example) -> torch.Tensor:
    """transformers' logits of one unpadded sample."""
    pair.theirs.model.rope_deltas = None
    with torch.no_grad():
        return pair.theirs(**inputs_of(one, pair.processor)).logits[0]


def logits(pair: Pair, examples: list[Example]) -> torch.Tensor:
    """Ours, at every position."""
    with torch.no_grad():
        return logits_of(pair.model, FAMILY.code.collate(examples, pair.processor))


def test_logits_of_a_mixed_batch_equal_transformers(pair: Pair) -> None:
    examples = mixed(pair.processor)
    ours = logits(pair, examples)
    for row, one in enumerate(examples):
        wanted = alone(pair, one)
        assert wanted.abs().max() > 0.5, "weights too small to tell anything"
        difference = (ours[row, : len(one.input_ids)] - wanted).abs().max()
        assert difference <= TOLERANCE * wanted.abs().max(), (one.id, float(difference))


def test_loss_is_the_sum_over_answer_tokens(pair: Pair) -> None:
    examples = mixed(pair.processor)
    batch = FAMILY.code.collate(examples, pair.processor)
    with torch.no_grad():
        result = decoding.forward(FAMILY, pair.model, batch)
    wanted = []
    for one in examples:
        found, labels = alone(pair, one)[:-1], torch.tensor(one.labels[1:])
        wanted.append(functional.cross_entropy(found, labels, reduction="sum"))
    assert torch.allclose(result.per_sample_loss, torch.stack(wanted), rtol=TOLERANCE)
    assert float(result.answer_loss_sum) == pytest.approx(float(sum(wanted)), rel=TOLERANCE)
    answers = sum(label != -100 for one in examples for label in one.labels)
    assert int(result.per_sample_tokens.sum()) == batch.num_answer_tokens == answers


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_the_models_own(pair: Pair, side: str) -> None:
    from mmtrain.models.batching import pad_ids

    examples = mixed(pair.processor)
    rows = [one.input_ids for one in examples]
    ids, mask = pad_ids(rows, side)
    found = batches.padded_positions(examples, rows, pair.processor, mask)
    types = (ids == pair.processor.image_token_id).long() * mask
    grid = torch.tensor([grid for one in examples for grid in one.extras["grid"]])
    wanted, _ = pair.theirs.model.get_rope_index(ids, types, grid, attention_mask=mask)
    assert torch.equal(found, wanted)


def test_images_count(pair: Pair) -> None:
    losses = []
    for number in (1, 2):
        one = example(pair.processor, "a", "Which?", "5", [image(number)])
        with torch.no_grad():
            result = decoding.forward(
                FAMILY, pair.model, FAMILY.code.collate([one], pair.processor)
            )
        losses.append(float(result.answer_loss_sum))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_padding_samples_run_but_change_nothing(pair: Pair) -> None:
    examples = mixed(pair.processor)
    padded = [*examples, replace(examples[0], weight=0.0)]
    plain = FAMILY.code.collate(examples, pair.processor)
    batch = FAMILY.code.collate(padded, pair.processor)
    assert batch.num_answer_tokens == plain.num_answer_tokens
    assert batch.num_tokens == plain.num_tokens
    with torch.no_grad():
        found = decoding.forward(FAMILY, pair.model, batch)
        wanted = decoding.forward(FAMILY, pair.model, plain)
    assert float(found.per_sample_loss[-1]) == 0.0
    assert float(found.answer_loss_sum) == pytest.approx(float(wanted.answer_loss_sum), rel=1e-6)


# --- the same modules, whatever a batch holds -----------------------------------------------------


@contextmanager
def calls(model: Any) -> Iterator[list[str]]:
    """The names of modules that own parameters, in the order they are entered."""
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    yield entered
    for hook in hooks:
        hook.remove()


def contents(processor: Any) -> dict[str, list[Example]]:
    """Batches of every kind."""
    with_image, text, *_ = examples = mixed(processor)
    return {"images": [with_image], "text": [text], "mixed": examples}


def test_every_batch_calls_the_same_modules(pair: Pair) -> None:
    model = pair.model
    found = {}
    for name, examples in contents(pair.processor).items():
        with calls(model) as entered:
            result = decoding.forward(FAMILY, model, FAMILY.code.collate(examples, pair.processor))
            result.answer_loss_sum.backward()
        found[name] = entered
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients), "backward skipped some"
        model.zero_grad()
    assert found["images"] == found["text"] == found["mixed"]
    owners = {n for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    assert set(found["text"]) == owners


def test_every_generation_calls_the_same_modules(pair: Pair) -> None:
    model, settings = pair.model, SimpleNamespace(**{**vars(GREEDY), "max_new_tokens": 1})
    found = {}
    for name, examples in contents(pair.processor).items():
        with calls(model) as entered:
            decoding.generate(FAMILY, model, pair.processor, examples, settings)
        found[name] = entered
    assert found["images"] == found["text"] == found["mixed"]
    assert Counter(found["text"])["model.visual.patch_embed.proj"] == 1


def test_a_blank_image_has_no_effect(pair: Pair) -> None:
    text = mixed(pair.processor)[1]
    batch = FAMILY.code.collate([text], pair.processor)
    model = pair.model
    result = decoding.forward(FAMILY, model, batch)
    result.answer_loss_sum.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.startswith("model.visual")]
    assert all(not gradient.any() for gradient in gradients if gradient is not None)
    model.zero_grad()
    batch.tensors["pixel_values"] = torch.randn(batch.tensors["pixel_values"].shape)
    with torch.no_grad():
        again = decoding.forward(FAMILY, model, batch)
    assert again.answer_loss_sum.item() == result.answer_loss_sum.item()


def test_activation_checkpointing_changes_no_gradient(pair: Pair) -> None:
    model = pair.model.train()
    batch = FAMILY.code.collate(mixed(pair.processor), pair.processor)
    found = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with calls(model) as entered:
            decoding.forward(FAMILY, model, batch).answer_loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    model.activation_checkpointing_disable()
    model.eval()
    repeated = Counter(entered)
    assert repeated["model.visual.blocks.0.attn.qkv"] == 2
    assert repeated["model.language_model.layers.0.mlp.up_proj"] == 2
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(*gradients) for gradients in zip(*found, strict=True))


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_batched_generation_equals_one_by_one(pair: Pair, beams: int) -> None:
    settings = SimpleNamespace(**{**vars(GREEDY), "num_beams": beams})
    examples = mixed(pair.processor)
    model, processor = pair.model, pair.processor
    together = decoding.generate(FAMILY, model, processor, examples, settings)
    single = [decoding.generate(FAMILY, model, processor, [one], settings)[0] for one in examples]
    assert together == single
    assert len(set(together)) > 1 and any(together), together
    assert model.model.rope_deltas is None, "positions of this call would leak into the next"


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_equals_transformers_own(pair: Pair, beams: int) -> None:
    settings = SimpleNamespace(**{**vars(GREEDY), "num_beams": beams})
    tokenizer = pair.processor.tokenizer
    for one in mixed(pair.processor):
        prompt = prompt_ids(one.input_ids, one.labels)
        pair.theirs.model.rope_deltas = None
        out = pair.theirs.generate(
            input_ids=torch.tensor([prompt]),
            mm_token_type_ids=token_types(prompt, pair.processor),
            **image_inputs(one),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=settings.max_new_tokens,
            num_beams=beams,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        wanted = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()
        assert decoding.generate(FAMILY, pair.model, pair.processor, [one], settings) == [wanted]


# --- dropout --------------------------------------------------------------------------------------


def test_packed_rows_have_the_masks_of_padded_ones() -> None:
    scope, keys, lengths = DropoutScope(3), torch.tensor([5, 2**40 + 1, 7]), (4, 9, 1)
    scope.set_rows("vision", keys)
    index = torch.cat([torch.arange(length) for length in lengths])
    scope.set_packed_rows("vision", keys.repeat_interleave(torch.tensor(lengths)), index)
    module = KeyedDropout(0.5, "model.visual.blocks.0.attn.qkv", "vision", scope).train()
    padded, packed = module(torch.ones(3, 9, 16)), module(torch.ones(14, 16))
    wanted = torch.cat([padded[row, :length] for row, length in enumerate(lengths)])
    assert torch.equal(packed, wanted)


def test_patches_are_keyed_by_sample_and_image(pair: Pair) -> None:
    examples = mixed(pair.processor)
    tensors = FAMILY.code.collate(examples, pair.processor).tensors
    wanted = [
        (stable_hash(one.key, number), index)
        for one in examples
        for number, rows in enumerate(one.pixels)
        for index in range(len(rows))
    ]
    assert list(zip(tensors["patch_keys"].tolist(), tensors["patch_index"].tolist())) == wanted


@pytest.fixture
def adapted(pair: Pair, tmp_path: Path) -> LoadedModel:
    """LoRA with dropout on every sublayer, its zero matrix made lively."""
    from mmtrain.config.schema import ComponentConfig
    from mmtrain.peft.trainable import make_trainable

    pair.model.save_pretrained(tmp_path)
    pair.processor.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    block = ComponentConfig(mode="peft", method="lora", r=4, alpha=64, dropout=0.5)
    make_trainable(loaded.model, FAMILY, {"vision": block, "llm": block}, 1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    loaded.model.train()
    return loaded


def test_dropout_masks_depend_on_no_batch_mate(adapted: LoadedModel) -> None:
    examples = mixed(adapted.processor)
    with torch.no_grad():
        together = decoding.forward(
            FAMILY, adapted.model, FAMILY.code.collate(examples, adapted.processor)
        )
        for row, one in enumerate(examples):
            single = decoding.forward(
                FAMILY, adapted.model, FAMILY.code.collate([one], adapted.processor)
            )
            wanted = float(single.answer_loss_sum)
            assert float(together.per_sample_loss[row]) == pytest.approx(wanted, rel=1e-4), one.id
        scope_of(adapted.model).step += 1
        later = decoding.forward(
            FAMILY, adapted.model, FAMILY.code.collate(examples, adapted.processor)
        )
    assert abs(float(later.answer_loss_sum - together.answer_loss_sum)) > 1e-2
