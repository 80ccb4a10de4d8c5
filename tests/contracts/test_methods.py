"""What every method promises, and that a new one is one file, found by listing the folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain import plugins
from mmtrain.assemble import Assembled, build_model
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.models import decoding
from mmtrain.models.interface import BatchSize, ForwardResult
from mmtrain.peft import methods
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from mmtrain.training.export import export_trained, merged_state
from tests.soaks import cases

CONNECTOR = "model.multi_modal_projector"
FIRST_BLOCK = "model.vision_tower.encoder.layers.0"
TINY_MODELS = [
    (family, preset)
    for family in plugins.names("family")
    for preset in plugins.load("family", family).presets
    if preset.startswith("tiny")
]
# A decoder and an encoder-decoder; images of the others are large.
KINDS = [("llava", "tiny"), ("instructblip", "tiny")]
# Where a method goes, if not into the language model.
PLACES = {"petal": "qformer", "maple": "qformer"}
# What a method cannot be put into, and what is said.
REFUSED = {
    ("prefix", "instructblip", "tiny"): "'prefix' needs a decoder alone",
    ("llama_adapter", "instructblip", "tiny"): "'llama_adapter' needs attentions of separate",
    ("llama_adapter", "qwen_vl", "tiny"): "'llama_adapter' needs attentions of separate",
}
SIZE = BatchSize(samples=2, tokens=40, answer_tokens=6)
# A learned scale per channel behind every block; in a component without blocks, behind each layer.
SCALE = """
import torch
from pydantic import BaseModel, ConfigDict

from mmtrain.peft.interface import Added


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = 1.0
    tells: bool = True


class Scale:
    options = Options
    needs_linears = False
    merges = True
    imports = ()

    def conflicts(self, options, around):
        return ("tells: not in a vision tower; leave it out",) if around.component == "gone" else ()

    def attach(self, target, options, seed):
        for name in self.places(target):
            module = target.model.get_submodule(name)
            width = target.attention.hidden if target.blocks else module.out_features
            module.scale = torch.nn.Parameter(torch.full((width,), options.start))
            module.register_buffer("start", torch.tensor([options.start]))
            module.register_forward_hook(lambda module, _, out: out * module.scale)
        trained = [f"{name}.scale" for name in self.places(target)] if options.tells else []
        stored = [f"{name}.start" for name in self.places(target)]
        return Added(tuple(trained), tuple(stored), starts_at_identity=options.start == 1.0)

    def places(self, target):
        blocks = [name for names in target.blocks.values() for name in names]
        return blocks or sorted({name.rpartition(".")[0] for name in target.parameters})

    def export_config(self, target, options, base):
        return {"peft_type": "SCALE", "base_model_name_or_path": base}

    def export_name(self, name, target):
        return f"base_model.model.{name}"

    def merge(self, target):
        with torch.no_grad():
            for layer in map(target.model.get_submodule, self.places(target)):
                layer.weight.mul_(layer.scale[:, None])
                layer.bias.mul_(layer.scale)
                layer.scale.fill_(1.0)


METHOD = Scale()
"""


@pytest.fixture
def scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of methods goes on in another one, which holds one file."""
    (tmp_path / "scale.py").write_text(SCALE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop(f"{methods.__name__}.scale", None)


def run_of(
    blocks: Mapping[str, dict[str, Any]] | None = None,
    model: tuple[str, str] = ("llava", "tiny"),
    **components: dict[str, Any],
) -> RunConfig:
    """A run of a tiny model; `blocks` are those whose names are no Python names."""
    named = {**(blocks or {}), **components}
    return resolve(
        {
            "model": {"family": model[0], "preset": model[1], "dtype": "fp32"},
            "components": {name: {"mode": "peft", **block} for name, block in named.items()},
            "optim": {"global_batch": SIZE.samples, "micro_batch": SIZE.samples},
        }
    )


def block_of(name: str) -> dict[str, Any]:
    """A method with what it cannot do without."""
    needed = {"peft_library": {"tuner": "loha", "r": 2}, "maple": {"depth": 2}}
    return {"method": name} | needed.get(name, {})


def place_of(name: str) -> str:
    return PLACES.get(name, "llm")


def fits(name: str, family: str) -> bool:
    return place_of(name) in plugins.load("family", family).components


def result_of(assembled: Assembled) -> ForwardResult:
    batch = assembled.family.code.planned_batch(assembled.model.config, SIZE)
    return decoding.forward(assembled.family, assembled.model, batch)


def loss_of(assembled: Assembled) -> torch.Tensor:
    return result_of(assembled).answer_loss_sum


@pytest.mark.parametrize(("family", "preset"), cases(KINDS, TINY_MODELS))
@pytest.mark.parametrize("name", plugins.names("method"))
def test_a_method_says_what_it_added(name: str, family: str, preset: str) -> None:
    tiny = (family, preset)
    blocks = {place_of(name): block_of(name)}
    if not fits(name, family):
        with pytest.raises(ConfigError, match=rf"components\.{place_of(name)}: unknown component"):
            run_of(blocks, model=tiny)
        return
    config = run_of(blocks, model=tiny)
    if reason := REFUSED.get((name, *tiny)):
        for refusing in (partial(examine, world_size=1), partial(build_model, zero3_config=None)):
            with pytest.raises(ConfigError, match=reason):
                refusing(config)
        return
    base = build_model(run_of(model=tiny), None)
    assembled = build_model(config, None)
    (attachment,) = assembled.trainable.attachments
    added = attachment.added
    assert added.trained and set(assembled.trainable.owner) == set(added.trained)
    found = result_of(assembled)
    if added.starts_at_identity is not None:
        same = torch.equal(found.answer_loss_sum, loss_of(base))
        assert same == added.starts_at_identity
    weighted = [weight * found.auxiliary[key] for key, weight in added.auxiliary.items()]
    sum(weighted, found.answer_loss_sum).backward()
    trained = assembled.trained_parameters()
    assert all(parameter.grad is not None for parameter in trained.values())
    assert len(attachment.exported(added.trained)) == len(trained)
    # What check counts on the meta device is what trains.
    part = examine(config, world_size=1)["components"][place_of(name)]
    assert part["trainable_params"] == sum(parameter.numel() for parameter in trained.values())
    assert part["modules"] == len(attachment.target.linears)


@pytest.mark.parametrize("name", plugins.names("method"))
def test_a_method_is_merged_or_says_why_not(name: str) -> None:
    tiny = next(kind for kind in KINDS if fits(name, kind[0]))
    assembled = build_model(run_of({place_of(name): block_of(name)}, model=tiny), None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assembled.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    wanted = loss_of(assembled)
    base = build_model(run_of(model=tiny), None)
    (attachment,) = assembled.trainable.attachments
    assert not torch.isclose(loss_of(base), wanted, rtol=3e-6)
    if not attachment.method.merges:
        with pytest.raises(MmtrainError, match="cannot be folded"):
            merged_state(assembled.model, assembled.trainable)
        return
    state = merged_state(assembled.model, assembled.trainable)
    base.model.load_state_dict(state, strict=False)
    torch.testing.assert_close(loss_of(base), wanted)


def test_two_methods_share_a_component() -> None:
    blocks = {
        "llm": {"method": "lora", "sublayers": ["attn"], "r": 4},
        "llm/mlp": {"method": "bottleneck", "sublayers": ["mlp"], "size": 8, "lr": 1e-3},
    }
    config = run_of(blocks)
    assembled = build_model(config, None)
    owners = assembled.trainable.owner
    assert set(owners.values()) == {"llm", "llm/mlp"}
    assert all((".mlp." in name) == (owner == "llm/mlp") for name, owner in owners.items())
    loss_of(assembled).backward()
    assert all(p.grad is not None for p in assembled.trained_parameters().values())
    part = examine(config, world_size=1)["components"]["llm"]
    assert part["method"] == "lora + bottleneck"
    sizes = {
        block: sum(assembled.model.get_parameter(n).numel() for n in owners if owners[n] == block)
        for block in blocks
    }
    assert part["placed"] == {
        "llm": {"attn": (16, sizes["llm"])},
        "llm/mlp": {"mlp": (12, sizes["llm/mlp"])},
    }
    # Each alone gives the same adapter: nothing depends on the other's being there.
    alone = build_model(run_of(llm=blocks["llm"]), None).trained_parameters()
    together = assembled.trained_parameters()
    assert all(torch.equal(together[name], parameter) for name, parameter in alone.items())


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        (
            {"llm": {"method": "lora"}, "llm/b": {"method": "ia3", "sublayers": ["attn"]}},
            r"components.llm/b: adapts attn \(.*self_attn.*, …\), as components.llm does",
        ),
        (
            {"llm": {"method": "lora"}, "llm/b": {"mode": "full"}},
            "llm and llm/b share a component, which only blocks with mode peft can",
        ),
        (
            {"llm": {"method": "prefix"}, "llm/b": {"method": "prefix"}},
            "components.llm/b: 'prefix' is there already, as components.llm;",
        ),
        ({"llm/a b": {"method": "lora"}}, "llm/a b: give letters and digits behind '/'"),
        ({"lm/b": {"method": "lora"}}, "lm/b: unknown component"),
        (
            {"llm/b": {"method": "lora", "sublayers": ["att"]}},
            "components.llm/b.sublayers: no sublayer 'att'",
        ),
        (
            {"llm": {"method": "lora", "rank_pattern": {"attn.x": 2}}},
            "components.llm.rank_pattern: 'attn.x' fits no module; .*attn.q.* or layers",
        ),
    ],
)
def test_blocks_that_do_not_fit_together(blocks: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of(blocks), world_size=1)


def test_a_new_method_is_one_file(scale: None) -> None:
    config = run_of(connector={"method": "scale"}, vision={"method": "scale", "layers": "first-1"})
    assembled = build_model(config, None)
    trained = assembled.trained_parameters()
    assert {name: tuple(parameter.shape) for name, parameter in trained.items()} == {
        f"{FIRST_BLOCK}.scale": (64,),
        f"{CONNECTOR}.linear_1.scale": (96,),
        f"{CONNECTOR}.linear_2.scale": (96,),
    }
    assert list(assembled.trainable.owner.values()) == ["vision", "connector", "connector"]
    report = examine(config, world_size=1)
    assert report["peft_params"] == report["trainable_params"] == 64 + 2 * 96
    part = report["components"]["connector"]
    assert (part["method"], part["modules"], part["peft_params"]) == ("scale", 0, 2 * 96)
    loss_of(assembled).backward()
    for name, parameter in assembled.model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns == (name in trained), name


def test_what_a_new_method_trains_and_stores_is_exported_and_merged(
    scale: None, tmp_path: Path
) -> None:
    config = run_of(connector={"method": "scale", "start": 1.5})
    assembled = build_model(config, None)
    trained = {n: parameter.detach() for n, parameter in assembled.trained_parameters().items()}
    save_file(trained, tmp_path / "trainable.safetensors")
    export_trained(tmp_path, tmp_path, config, assembled)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(exported) == {
        f"base_model.model.{CONNECTOR}.linear_{number}.{name}"
        for number in (1, 2)
        for name in ("scale", "start")
    }
    assert all(bool((tensor == 1.5).all()) for tensor in exported.values())
    before = loss_of(assembled)
    base = build_model(run_of(), None)
    state = merged_state(assembled.model, assembled.trainable)
    assert set(state) == {name for name, _ in base.model.named_parameters()}
    base.model.load_state_dict(state, strict=False)
    torch.testing.assert_close(loss_of(base), before)


def test_nothing_is_added_without_a_word(scale: None) -> None:
    silent = run_of(connector={"method": "scale", "tells": False})
    with pytest.raises(AssertionError, match="added but not declared: .*linear_1.scale"):
        build_model(silent, None)


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ({"sublayers": ["attn"]}, "connector.sublayers: 'scale' reads none; leave it out"),
        ({"layers": "last-1"}, "connector.layers: got 'last-1', but it has no numbered layers"),
        ({"r": 4}, "connector.r: unknown key"),
    ],
)
def test_what_a_new_method_does_not_read_is_an_error(
    scale: None, block: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        examine(run_of(connector={"method": "scale", **block}), world_size=1)
