"""InstructBLIP's own dropout: off, or keyed by sample wherever the published models drop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models.dropout import (
    KeyedAttentionDropout,
    KeyedDropout,
    scope_of,
)
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from tests.unit.instructblip_material import FAMILY, TWINS, load, mixed, write_lively


@pytest.fixture(scope="module", params=TWINS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("instructblip"), request.param)


@pytest.fixture(scope="module")
def dropping(folder: Path) -> LoadedModel:
    return load(folder, base_dropout="checkpoint")


@pytest.fixture(scope="module")
def plain(folder: Path) -> LoadedModel:
    return load(folder)


def losses(
    loaded: LoadedModel, examples: list[Example], step: int = 1, training: bool = True
) -> dict[str, float]:
    """Each sample's loss at a step of training."""
    scope = scope_of(loaded.model)
    scope.seed, scope.step = 7, step
    loaded.model.train(training)
    batch = FAMILY.collate(examples, loaded.processor)
    with torch.no_grad():
        found = FAMILY.forward(loaded.model, batch).per_sample_loss
    loaded.model.eval()
    return dict(zip(batch.ids, found.tolist(), strict=True))


def test_a_sample_meets_the_same_masks_alone_and_in_any_batch(dropping: LoadedModel) -> None:
    examples = mixed(dropping.processor)
    together = losses(dropping, examples)
    backwards = losses(dropping, examples[::-1])
    for one in examples:
        alone = losses(dropping, [one])[one.id]
        assert together[one.id] == pytest.approx(alone, rel=1e-5), one.id
        assert backwards[one.id] == pytest.approx(alone, rel=1e-5), one.id


def test_steps_differ_and_repeat(dropping: LoadedModel) -> None:
    examples = [one for one in mixed(dropping.processor) if one.pixels]
    first, second = losses(dropping, examples, 1), losses(dropping, examples, 2)
    assert min(abs(first[name] - second[name]) for name in first) > 1e-3
    assert losses(dropping, examples, 1) == first


def test_no_generator_is_drawn_from(dropping: LoadedModel) -> None:
    before = torch.random.get_rng_state()
    losses(dropping, mixed(dropping.processor))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluation_equals_the_base_without_dropout(
    dropping: LoadedModel, plain: LoadedModel
) -> None:
    examples = mixed(plain.processor)
    found = losses(dropping, examples, training=False)
    assert found == pytest.approx(losses(plain, examples, training=False), rel=1e-5)
    assert losses(dropping, examples, training=True) != pytest.approx(found, rel=1e-3)


def test_zero_turns_every_dropout_off(plain: LoadedModel) -> None:
    modules = list(plain.model.modules())
    assert not any(isinstance(one, KeyedDropout | KeyedAttentionDropout) for one in modules)
    assert not any(isinstance(one, torch.nn.Dropout) and one.p for one in modules)
    examples = mixed(plain.processor)
    assert losses(plain, examples, training=True) == losses(plain, examples, training=False)


def test_every_published_dropout_is_keyed(dropping: LoadedModel) -> None:
    """Each of them drops something in a forward: none is left out, none is left over."""
    model: Any = dropping.model
    assert not any(isinstance(one, torch.nn.Dropout) and one.p for one in model.modules())
    keyed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, KeyedDropout | KeyedAttentionDropout)
    }
    qformer, text = dropping.config.qformer_config, dropping.config.text_config
    layers, crossing = qformer.num_hidden_layers, (qformer.num_hidden_layers + 1) // 2
    # Per layer: self-attention and two feed-forward branches; the embeddings; probabilities.
    wanted = 3 * layers + crossing + 1 + (layers + crossing)
    if text.model_type == "t5":
        encoder, decoder = text.num_layers, text.num_decoder_layers
        # A stack's own at both ends; around each attention; two in each feed-forward.
        wanted += 2 + (1 + 2) * encoder + (2 + 2) * decoder + encoder + 2 * decoder
    assert len(keyed) == wanted
    assert {one.p for one in keyed.values()} == {0.1}
    dropped: set[str] = set()

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            if not torch.equal(inputs[0], out):
                dropped.add(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in keyed.items()]
    losses(dropping, mixed(dropping.processor))
    for hook in hooks:
        hook.remove()
    assert dropped == set(keyed)


def test_generation_is_that_of_the_base(dropping: LoadedModel, plain: LoadedModel) -> None:
    from tests.unit.instructblip_material import GREEDY

    examples = mixed(plain.processor)
    answers = [
        FAMILY.generate(one.model, one.processor, examples, GREEDY) for one in (dropping, plain)
    ]
    assert answers[0] == answers[1]


def test_attention_masks_ignore_padding_and_tell_heads_apart() -> None:
    scope = scope_of(torch.nn.Module())
    module = KeyedAttentionDropout(0.5, "attention", "llm", scope)
    scope.set_rows("llm", torch.tensor([5, 6]))
    wide = module(torch.ones(2, 3, 7, 9))
    narrow = module(torch.ones(2, 3, 4, 5))
    assert torch.equal(wide[:, :, :4, :5], narrow)
    patterns = wide.reshape(2 * 3 * 7, 9)
    assert len({tuple(row.tolist()) for row in patterns}) > 35
    assert 0.4 < float((wide == 0).float().mean()) < 0.6
    assert set(wide.unique().tolist()) == {0.0, 2.0}


def test_dropout_that_cannot_be_keyed_is_refused(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())
    stored["vision_config"]["attention_dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="Set model.base_dropout: 0"):
        FAMILY.model_config(ModelOptions(str(tmp_path), None, base_dropout="checkpoint"))
    config = FAMILY.model_config(ModelOptions(str(tmp_path), None))
    assert config.vision_config.attention_dropout == 0
