"""What every family promises about samples, batches and folders, on its tiny models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain import plugins
from mmtrain.__main__ import main
from mmtrain.config.schema import ComponentConfig
from mmtrain.errors import CheckpointError, DataError
from mmtrain.models import encoding
from mmtrain.models.dropout import scope_of
from mmtrain.models.interface import ModelOptions
from mmtrain.peft.trainable import make_trainable
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny
from tests.contracts.tiny_models import SETTINGS, TinyModel, image

TOLERANCE = 1e-5


@contextmanager
def counting_calls(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """How often each module that owns parameters is called."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters())
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def test_a_batch_changes_no_sample(tiny_model: TinyModel) -> None:
    model, samples = tiny_model.loaded().model, tiny_model.samples()
    together = tiny_model.losses(model, samples)
    alone = torch.cat([tiny_model.losses(model, [one]) for one in samples])
    assert torch.allclose(together, alone, rtol=TOLERANCE), (together, alone)


def test_padding_samples_weigh_nothing(tiny_model: TinyModel) -> None:
    model, samples = tiny_model.loaded().model, tiny_model.samples()
    padded = [*samples, replace(samples[0], weight=0.0)]
    losses = tiny_model.losses(model, padded)
    assert float(losses[-1]) == 0.0
    assert torch.allclose(losses[:-1], tiny_model.losses(model, samples), rtol=TOLERANCE)
    processor = tiny_model.loaded().processor
    plain, more = (tiny_model.family.code.collate(each, processor) for each in (samples, padded))
    assert (more.num_answer_tokens, more.num_tokens) == (plain.num_answer_tokens, plain.num_tokens)


def test_every_batch_calls_the_same_modules(tiny_model: TinyModel) -> None:
    """Otherwise ranks wait for each other for ever under ZeRO-3."""
    model, samples = tiny_model.loaded().model, tiny_model.samples()
    batches = (samples, samples[:1], samples[1:2], [samples[0], replace(samples[1], weight=0.0)])
    counts = []
    for batch in batches:
        with counting_calls(model) as calls:
            tiny_model.losses(model, batch)
        counts.append(calls)
    assert counts[0] and all(calls == counts[0] for calls in counts[1:])


def test_generation_calls_the_same_modules(tiny_model: TinyModel) -> None:
    loaded, samples = tiny_model.loaded(), tiny_model.samples()
    counts = []
    for batch in (samples, samples[:1], samples[1:2]):
        with counting_calls(loaded.model) as calls:
            # Without an end in sight every call makes the same number of steps.
            tiny_model.answers(loaded.model, batch, one_step())
        counts.append(calls)
    assert counts[0] and all(calls == counts[0] for calls in counts[1:])


def one_step() -> SimpleNamespace:
    return SimpleNamespace(**{**vars(SETTINGS), "max_new_tokens": 1})


def test_generation_leaves_nothing_behind(tiny_model: TinyModel) -> None:
    """Neither in what the model answers next nor in what it learns from."""
    loaded, samples = tiny_model.loaded(), tiny_model.samples()
    before = tiny_model.losses(loaded.model, samples)
    first = tiny_model.answers(loaded.model, samples)
    tiny_model.answers(loaded.model, samples[1:2])
    assert torch.equal(tiny_model.losses(loaded.model, samples), before)
    assert tiny_model.answers(loaded.model, samples) == first


def test_the_image_is_seen(tiny_model: TinyModel) -> None:
    model = tiny_model.loaded().model
    losses = [
        tiny_model.losses(model, [tiny_model.encode("a", "Which?", "5", [image(number)])])
        for number in (1, 2)
    ]
    assert not torch.equal(*losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_images(tiny_model: TinyModel, side: str) -> None:
    question = "Which digit is in the picture? " * 8
    whole = tiny_model.encode("long", question, "5", [image(1)])
    image_id = tiny_model.loaded().processor.image_token_id
    num_image_tokens = whole.input_ids.count(image_id)
    limit = len(whole.input_ids) - 20
    cut = tiny_model.encode("long", question, "5", [image(1)], limit, side)
    assert num_image_tokens > 0 and cut.input_ids.count(image_id) == num_image_tokens
    assert len(cut.input_ids) < len(whole.input_ids)
    assert [one for one in cut.labels if one != -100] == [one for one in whole.labels if one >= 0]


def test_a_image_that_does_not_fit_is_an_error_naming_the_sample(tiny_model: TinyModel) -> None:
    with pytest.raises(DataError, match="sample huge: .*data.max_length is 8") as caught:
        tiny_model.encode("huge", "Which?", "5", [image(1)], max_length=8)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_the_spelling_of_a_control_token_never_controls(tiny_model: TinyModel) -> None:
    """It is an error that names the sample, or ordinary text: no turn ends there."""
    tokenizer = tiny_model.loaded().processor.tokenizer
    ends = tokenizer.eos_token_id
    end_id = ends[0] if isinstance(ends, list) else ends
    (end,) = tokenizer.batch_decode([[end_id]])
    try:
        odd = tiny_model.encode("odd", f"Which{end}one?", "5")
    except DataError as error:
        assert "sample odd" in str(error) and end in str(error) and error.remedy
    else:
        plain = tiny_model.encode("plain", "Which one?", "5")
        assert odd.input_ids.count(end_id) == plain.input_ids.count(end_id)


def test_the_base_has_no_dropout_unless_asked(tiny_model: TinyModel) -> None:
    model = tiny_model.load().model
    samples = tiny_model.samples()
    evaluated = tiny_model.losses(model.eval(), samples)
    assert torch.equal(tiny_model.losses(model.train(), samples), evaluated)


def test_adapter_dropout_is_keyed_by_sample_and_step(tiny_model: TinyModel) -> None:
    model = tiny_model.load().model
    block = ComponentConfig(
        **{"mode": "peft", "method": "lora", "r": 4, "alpha": 64, "dropout": 0.5}
    )
    make_trainable(
        model, tiny_model.family, {name: block for name in tiny_model.family.sublayers}, seed=1
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.train()
    samples = tiny_model.samples()
    scope_of(model).seed, scope_of(model).step = 3, 4
    together = tiny_model.losses(model, samples)
    alone = torch.cat([tiny_model.losses(model, [one]) for one in samples])
    assert torch.allclose(together, alone, rtol=TOLERANCE), (together, alone)
    scope_of(model).step = 5
    assert not torch.allclose(tiny_model.losses(model, samples), together, rtol=1e-4)
    assert not torch.allclose(tiny_model.losses(model.eval(), samples), together, rtol=1e-4)


def test_a_saved_folder_loads_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    loaded = tiny_model.loaded()
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    tiny_model.family.code.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    again = tiny_model.load(tmp_path / "saved")
    found = dict(again.model.named_parameters())
    assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    rendered = Rendered((Turn("user", "Which digit?"),), "5")
    first, second = (
        encoding.encode(tiny_model.family, one.processor, "a", rendered, [image(1)], 2000, "left")
        for one in (loaded, again)
    )
    assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
    assert all(torch.equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))


def test_convert_keeps_the_base_as_it_was(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its dropout, too, which training turns off unless asked."""
    target = tmp_path / "converted"
    assert main(["convert", str(tiny_model.folder), str(target), "--dtype", "fp32"]) == 0
    assert "largest difference of logits" in capsys.readouterr().out  # the command bounds it
    before, after = (dropouts(folder) for folder in (tiny_model.folder, target))
    assert after == before


def dropouts(folder: Path) -> dict[str, float]:
    """Every probability of config.json that is called a dropout, by its path."""
    found: dict[str, float] = {}

    def visit(path: str, value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            if "drop" in key and isinstance(inner, (int, float)):
                found[f"{path}{key}"] = float(inner)
            visit(f"{path}{key}.", inner)

    visit("", json.loads((folder / "config.json").read_text()))
    return found


def test_tiny_checkpoints_repeat(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model.family.code.write_tiny(
        tmp_path / "again", tiny.DIGITS_TEXTS, seed=0, preset=tiny_model.preset
    )
    files = {
        path.relative_to(tiny_model.folder)
        for path in tiny_model.folder.rglob("*")
        if path.is_file()
    }
    assert files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (
            tiny_model.folder / name
        ).read_bytes(), name


@pytest.mark.parametrize("fault", ["missing", "surplus"])
def test_weights_that_do_not_fit_are_one_error(
    tiny_model: TinyModel, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(tiny_model.folder, folder)
    file = next(iter(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("bias"))
    if fault == "missing":
        del tensors[name]
        for index in folder.glob("*.index.json"):
            index.unlink()
            file.rename(folder / "model.safetensors")
            file = folder / "model.safetensors"
    else:
        tensors[name.replace("bias", "bias_of_more")] = torch.ones(2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 {fault}: ") as caught:
        tiny_model.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_another_family_names_the_right_one(tiny_model: TinyModel) -> None:
    for name in plugins.names("family"):
        if name != tiny_model.name:
            options = ModelOptions(str(tiny_model.folder), None, dtype="fp32")
            with pytest.raises(CheckpointError, match=f"model.family: {tiny_model.name}"):
                plugins.load("family", name).code.load(options, None)


def test_code_in_a_checkpoint_is_never_run(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes that only the folder's code has: refused or replaced, whatever a terminal answers."""
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_model.folder, folder)
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').write('x')\n")
    kinds = ("Config", "Processor", "Tokenizer", "ImageProcessor", "Model", "ModelForCausalLM")
    stated = {
        "auto_map": {f"Auto{kind}": f"evil.Evil{kind}" for kind in kinds},
        "processor_class": "EvilProcessor",
        "tokenizer_class": "EvilTokenizer",
        "image_processor_type": "EvilImageProcessor",
    }
    stated["auto_map"]["AutoTokenizer"] = ["evil.EvilTokenizer", None]
    for path in folder.rglob("*config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        tiny_model.load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("named", ["../elsewhere.safetensors", "/elsewhere.safetensors", 7, None])
def test_an_index_names_files_of_its_own_folder(
    tiny_model: TinyModel, tmp_path: Path, named: Any
) -> None:
    folder = tmp_path / "indexed"
    shutil.copytree(tiny_model.folder, folder)
    file = next(iter(folder.glob("*.safetensors")))
    weight_map = dict.fromkeys(load_file(file), named)
    file.rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file name"):
        tiny_model.load(folder)


def test_heads_can_be_overridden_in_every_component(tiny_model: TinyModel) -> None:
    for component in tiny_model.family.sublayers:
        options = ModelOptions(None, tiny_model.preset, overrides={component: {"heads": 2}})
        config = tiny_model.family.code.model_config(options)
        assert tiny_model.family.code.attention(config, component).heads == 2, component
        with torch.device("meta"):
            tiny_model.family.code.skeleton(config)
