"""InstructBLIP's own dropout: off, or keyed by sample wherever the published models drop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import CheckpointError
from mmtrain.models import decoding
from mmtrain.models.dropout import (
    KeyedAttentionDropout,
    KeyedDropout,
    scope_of,
)
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from tests.unit.instructblip_material import FAMILY, GREEDY, TINY_MODELS, load, mixed, write_lively


@pytest.fixture(scope="module", params=TINY_MODELS)
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
    batch = FAMILY.code.collate(examples, loaded.processor)
    with torch.no_grad():
        found = decoding.forward(FAMILY, loaded.model, batch).per_sample_loss
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
        # Both ends of each stack; around each attention; two in each feed-forward.
        wanted += 2 * 2 + (1 + 2) * encoder + (2 + 2) * decoder + encoder + 2 * decoder
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


def masks_at_the_ends(loaded: LoadedModel, step: int) -> dict[str, list[torch.Tensor]]:
    """What each of T5's stacks drops of ones: at its input, then behind its last norm."""
    masks: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": []}
    hooks = []
    for name, found in masks.items():
        dropout = loaded.model.get_submodule(f"language_model.{name}.dropout")

        def ones(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            return torch.ones_like(inputs[0])

        def keep(_: Any, __: Any, out: torch.Tensor, found: list[torch.Tensor] = found) -> None:
            found.append(out)

        hooks += [dropout.register_forward_pre_hook(ones), dropout.register_forward_hook(keep)]
    losses(loaded, mixed(loaded.processor), step)
    for hook in hooks:
        hook.remove()
    return masks


@contextmanager
def interrupted(module: torch.nn.Module) -> Iterator[None]:
    """What runs inside fails where it reaches the module."""

    def fail(*_: Any) -> None:
        raise RuntimeError("interrupted")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        yield
    hook.remove()


def test_the_ends_of_a_stack_drop_by_masks_of_their_own(tmp_path: Path) -> None:
    dropping = load(write_lively(tmp_path, "tiny"), base_dropout="checkpoint")
    masks = masks_at_the_ends(dropping, 1)
    # Neither generation nor an interrupted forward in between may shift what comes next.
    decoding.generate(FAMILY, dropping.model, dropping.processor, mixed(dropping.processor), GREEDY)
    with interrupted(dropping.model.get_submodule("language_model.encoder.block.1")):
        losses(dropping, mixed(dropping.processor))
    again, later = masks_at_the_ends(dropping, 1), masks_at_the_ends(dropping, 2)
    for name, ends in masks.items():
        assert len(ends) == 2
        for number, end in enumerate(ends):
            assert 0.05 < float((end == 0).float().mean()) < 0.15
            assert torch.equal(end, again[name][number])
            assert not torch.equal(end, later[name][number])
        both = ((ends[0] == 0) & (ends[1] == 0)).float().mean()
        assert float(both) < 0.03, "independent masks share one element in a hundred"


def test_where_nothing_trains_the_stored_values_stay(folder: Path, tmp_path: Path) -> None:
    """Also those that training would refuse; what is computed is the base."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    stored = json.loads((source / "config.json").read_text())
    stored["vision_config"]["attention_dropout"] = 0.2
    if stored["text_config"]["model_type"] == "llama":
        stored["text_config"]["attention_dropout"] = 0.3
    (source / "config.json").write_text(json.dumps(stored))
    loaded = load(source, base_dropout="stored")
    state = dict(loaded.model.named_parameters())
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    for part in ("vision_config", "qformer_config", "text_config"):
        wanted = {name: value for name, value in stored[part].items() if "dropout" in name}
        assert wanted and {name: written[part][name] for name in wanted} == wanted, part
    assert written["qformer_config"]["hidden_dropout_prob"] == 0.1
    plain = load(folder)
    examples = mixed(plain.processor)
    assert losses(loaded, examples, training=False) == losses(plain, examples, training=False)


def test_generation_is_that_of_the_base(dropping: LoadedModel, plain: LoadedModel) -> None:
    examples = mixed(plain.processor)
    answers = [
        decoding.generate(FAMILY, one.model, one.processor, examples, GREEDY)
        for one in (dropping, plain)
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
    with pytest.raises(CheckpointError, match="dropout 0.1 of .*Set model.base_dropout: 0"):
        FAMILY.code.model_config(ModelOptions(str(tmp_path), None, base_dropout="checkpoint"))
    config = FAMILY.code.model_config(ModelOptions(str(tmp_path), None))
    assert config.vision_config.attention_dropout == 0
