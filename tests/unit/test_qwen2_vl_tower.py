"""What the towers of Qwen2-VL, 2.5 and 3 compute of the images' sizes, done beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtrain.models import decoding
from mmtrain.models.families.qwen2_vl.tower_plan import plan
from mmtrain.models.interface import Batch, LoadedModel
from tests.unit.qwen2_vl_material import FAMILY, GREEDY, TINY, load, mixed, write_lively

META = torch.device("meta")  # its tensors have no values: reading any is an error


@pytest.fixture(scope="module", params=TINY)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("qwen2_vl") / request.param
    return load(write_lively(folder, request.param))


@pytest.fixture
def without_values(loaded: LoadedModel) -> Any:
    """The model's shapes."""
    with META:
        return FAMILY.code.skeleton(loaded.config)


def batch_of(loaded: LoadedModel) -> Batch:
    return FAMILY.code.collate(mixed(loaded.processor), loaded.processor)


def test_a_planned_tower_makes_the_same_features(loaded: LoadedModel) -> None:
    batch = batch_of(loaded)
    pixels, grid = batch.tensors["pixel_values"], batch.host["grid"]
    model: Any = loaded.model
    tower = model.model.visual
    with torch.no_grad():
        wanted = tower(pixels, grid_thw=grid)
        # Sizes that would make other features, if they were looked at.
        found = tower(pixels, grid_thw=grid.flip(0), **plan(tower, grid, pixels.device))
    assert torch.equal(found.pooler_output, wanted.pooler_output)
    deep = [one.get("deepstack_features") or () for one in (found, wanted)]
    assert all(torch.equal(*pair) for pair in zip(*deep, strict=True))


def test_forward_reads_nothing_back_before_the_llm(
    loaded: LoadedModel, without_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def caught(**given: Any) -> Any:
        seen.append(given)
        raise StopIteration

    monkeypatch.setattr(without_values.model.language_model, "forward", caught)
    with pytest.raises(StopIteration):
        decoding.hidden_states(FAMILY, without_values, batch_of(loaded).to(META))
    assert seen[0]["inputs_embeds"].device == META


def test_generation_reads_nothing_back_before_the_llm(
    loaded: LoadedModel, without_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, seen = mixed(loaded.processor), []

    def caught(**given: Any) -> Any:
        seen.append(given)
        return torch.zeros(len(given["attention_mask"]), 0, dtype=torch.long)

    monkeypatch.setattr(without_values, "generate", caught)
    assert decoding.generate(FAMILY, without_values, loaded.processor, examples, GREEDY) == [""] * 4
    assert seen[0]["inputs_embeds"].device == META


def test_flash_attention_has_its_lengths_on_the_device(
    loaded: LoadedModel, without_values: Any
) -> None:
    """Its longest rows are numbers; other attention has all lengths on the host."""
    grid = batch_of(loaded).host["grid"]
    tower = without_values.model.visual
    usual = plan(tower, grid, META)
    tower.config._attn_implementation = "flash_attention_2"
    found = plan(tower, grid, META)
    lengths = {name for name in usual if name.startswith("cu_")}
    assert {usual[name].device.type for name in lengths} == {"cpu"}
    assert {found[name].device for name in lengths} == {META}
    longest = {name: value for name, value in found.items() if name.startswith("max_")}
    assert len(longest) == len(lengths) and not any(name.startswith("max_") for name in usual)
    assert longest["max_seqlen"] == int(grid.prod(-1).max())
    for name, value in longest.items():
        ends = usual[name.replace("max_", "cu_") + "s"]
        assert value == int(ends.diff().max())
