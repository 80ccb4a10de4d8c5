"""What every family promises about samples, batches and folders, on its tiny twins."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtrain import plugins
from mmtrain.__main__ import main
from mmtrain.config.schema import ComponentConfig
from mmtrain.errors import CheckpointError, DataError
from mmtrain.models.dropout import scope_of
from mmtrain.models.interface import Example, LoadedModel, ModelOptions
from mmtrain.peft.trainable import make_trainable
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny

TWINS = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
    if preset.startswith("tiny")
]
TOLERANCE = 1e-5
SETTINGS = SimpleNamespace(
    max_new_tokens=4, num_beams=1, length_penalty=1.0, repetition_penalty=1.0, batch_size=8
)


class Twin:
    """A tiny checkpoint of a family, loaded."""

    def __init__(self, root: Path, name: str, preset: str) -> None:
        self.name, self.preset = name, preset
        self.family = plugins.load("family", name)
        self.folder = root / f"{name}-{preset}"
        self.family.write_tiny(self.folder, tiny.DIGITS_TEXTS, seed=0, preset=preset)

    @cache
    def loaded(self) -> LoadedModel:
        """The model, shared by tests that leave it as it is."""
        return self.load()

    def load(self, folder: Path | None = None, **options: Any) -> LoadedModel:
        """A model of its own."""
        chosen = ModelOptions(str(folder or self.folder), None, dtype="fp32", **options)
        return self.family.load(chosen, None)

    def encode(
        self,
        name: str,
        question: str,
        target: str,
        pictures: Sequence[Image.Image] = (),
        max_length: int = 2000,
        side: str = "left",
    ) -> Example:
        """One question, one answer."""
        rendered = Rendered((Turn("user", question),), target)
        processor = self.loaded().processor
        return self.family.encode(processor, name, rendered, pictures, max_length, side)

    def samples(self) -> list[Example]:
        """With and without picture, of different lengths."""
        return [
            self.encode("short", "Which?", "5", [picture(1)]),
            self.encode("text", "Which of these: 0, 1, 2, 3?", "7 and 8"),
            self.encode("long", "Which digit is in the picture? " * 3, "2", [picture(2)]),
        ]

    def losses(self, model: Any, examples: Sequence[Example]) -> torch.Tensor:
        """Per sample."""
        batch = self.family.collate(examples, self.loaded().processor)
        with torch.no_grad():
            return self.family.forward(model, batch).per_sample_loss


def picture(number: int) -> Image.Image:
    """A picture like no other."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Twin]:
    root = tmp_path_factory.mktemp("twins")
    return {twin: Twin(root, *twin) for twin in TWINS}


@pytest.fixture(params=TWINS, ids=["-".join(twin) for twin in TWINS])
def twin(twins: dict[tuple[str, str], Twin], request: pytest.FixtureRequest) -> Twin:
    return twins[request.param]


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


def test_a_batch_changes_no_sample(twin: Twin) -> None:
    model, samples = twin.loaded().model, twin.samples()
    together = twin.losses(model, samples)
    alone = torch.cat([twin.losses(model, [one]) for one in samples])
    assert torch.allclose(together, alone, rtol=TOLERANCE), (together, alone)


def test_padding_samples_weigh_nothing(twin: Twin) -> None:
    model, samples = twin.loaded().model, twin.samples()
    padded = [*samples, replace(samples[0], weight=0.0)]
    losses = twin.losses(model, padded)
    assert float(losses[-1]) == 0.0
    assert torch.allclose(losses[:-1], twin.losses(model, samples), rtol=TOLERANCE)
    processor = twin.loaded().processor
    plain, more = (twin.family.collate(each, processor) for each in (samples, padded))
    assert (more.num_answer_tokens, more.num_tokens) == (plain.num_answer_tokens, plain.num_tokens)


def test_every_batch_calls_the_same_modules(twin: Twin) -> None:
    """Otherwise ranks wait for each other for ever under ZeRO-3."""
    model, samples = twin.loaded().model, twin.samples()
    batches = (samples, samples[:1], samples[1:2], [samples[0], replace(samples[1], weight=0.0)])
    counts = []
    for batch in batches:
        with counting_calls(model) as calls:
            twin.losses(model, batch)
        counts.append(calls)
    assert counts[0] and all(calls == counts[0] for calls in counts[1:])


def test_generation_calls_the_same_modules(twin: Twin) -> None:
    loaded, samples = twin.loaded(), twin.samples()
    counts = []
    for batch in (samples, samples[:1], samples[1:2]):
        with counting_calls(loaded.model) as calls:
            # Without an end in sight every call makes the same number of steps.
            twin.family.generate(loaded.model, loaded.processor, batch, one_step())
        counts.append(calls)
    assert counts[0] and all(calls == counts[0] for calls in counts[1:])


def one_step() -> SimpleNamespace:
    return SimpleNamespace(**{**vars(SETTINGS), "max_new_tokens": 1})


def test_generation_leaves_nothing_behind(twin: Twin) -> None:
    """Neither in what the model answers next nor in what it learns from."""
    loaded, samples = twin.loaded(), twin.samples()
    before = twin.losses(loaded.model, samples)
    first = twin.family.generate(loaded.model, loaded.processor, samples, SETTINGS)
    twin.family.generate(loaded.model, loaded.processor, samples[1:2], SETTINGS)
    assert torch.equal(twin.losses(loaded.model, samples), before)
    assert twin.family.generate(loaded.model, loaded.processor, samples, SETTINGS) == first


def test_the_picture_is_seen(twin: Twin) -> None:
    model = twin.loaded().model
    losses = [
        twin.losses(model, [twin.encode("a", "Which?", "5", [picture(number)])])
        for number in (1, 2)
    ]
    assert not torch.equal(*losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_pictures(twin: Twin, side: str) -> None:
    question = "Which digit is in the picture? " * 8
    whole = twin.encode("long", question, "5", [picture(1)])
    image_id = twin.loaded().processor.image_token_id
    num_picture_tokens = whole.input_ids.count(image_id)
    limit = len(whole.input_ids) - 20
    cut = twin.encode("long", question, "5", [picture(1)], limit, side)
    assert num_picture_tokens > 0 and cut.input_ids.count(image_id) == num_picture_tokens
    assert len(cut.input_ids) < len(whole.input_ids)
    assert [one for one in cut.labels if one != -100] == [one for one in whole.labels if one >= 0]


def test_a_picture_that_does_not_fit_is_an_error_naming_the_sample(twin: Twin) -> None:
    with pytest.raises(DataError, match="sample huge: .*data.max_length is 8") as caught:
        twin.encode("huge", "Which?", "5", [picture(1)], max_length=8)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_the_spelling_of_a_control_token_never_controls(twin: Twin) -> None:
    """It is an error that names the sample, or ordinary text: no turn ends there."""
    tokenizer = twin.loaded().processor.tokenizer
    ends = tokenizer.eos_token_id
    end_id = ends[0] if isinstance(ends, list) else ends
    (end,) = tokenizer.batch_decode([[end_id]])
    try:
        odd = twin.encode("odd", f"Which{end}one?", "5")
    except DataError as error:
        assert "sample odd" in str(error) and end in str(error) and error.remedy
    else:
        plain = twin.encode("plain", "Which one?", "5")
        assert odd.input_ids.count(end_id) == plain.input_ids.count(end_id)


def test_the_base_has_no_dropout_unless_asked(twin: Twin) -> None:
    model = twin.load().model
    samples = twin.samples()
    evaluated = twin.losses(model.eval(), samples)
    assert torch.equal(twin.losses(model.train(), samples), evaluated)


def test_adapter_dropout_is_keyed_by_sample_and_step(twin: Twin) -> None:
    model = twin.load().model
    block = ComponentConfig(
        **{"mode": "peft", "method": "lora", "r": 4, "alpha": 64, "dropout": 0.5}
    )
    make_trainable(model, twin.family, {name: block for name in twin.family.sublayers}, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.train()
    samples = twin.samples()
    scope_of(model).seed, scope_of(model).step = 3, 4
    together = twin.losses(model, samples)
    alone = torch.cat([twin.losses(model, [one]) for one in samples])
    assert torch.allclose(together, alone, rtol=TOLERANCE), (together, alone)
    scope_of(model).step = 5
    assert not torch.allclose(twin.losses(model, samples), together, rtol=1e-4)
    assert not torch.allclose(twin.losses(model.eval(), samples), together, rtol=1e-4)


def test_a_saved_folder_loads_again(twin: Twin, tmp_path: Path) -> None:
    loaded = twin.loaded()
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    twin.family.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    again = twin.load(tmp_path / "saved")
    found = dict(again.model.named_parameters())
    assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    rendered = Rendered((Turn("user", "Which digit?"),), "5")
    first, second = (
        twin.family.encode(one.processor, "a", rendered, [picture(1)], 2000, "left")
        for one in (loaded, again)
    )
    assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
    assert all(torch.equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))


def test_convert_keeps_the_base_as_it_was(
    twin: Twin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its dropout, too, which training turns off unless asked."""
    target = tmp_path / "converted"
    assert main(["convert", str(twin.folder), str(target), "--dtype", "fp32"]) == 0
    assert "largest difference of logits" in capsys.readouterr().out  # the command bounds it
    before, after = (dropouts(folder) for folder in (twin.folder, target))
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


def test_tiny_checkpoints_repeat(twin: Twin, tmp_path: Path) -> None:
    twin.family.write_tiny(tmp_path / "again", tiny.DIGITS_TEXTS, seed=0, preset=twin.preset)
    files = {path.relative_to(twin.folder) for path in twin.folder.rglob("*") if path.is_file()}
    assert files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (twin.folder / name).read_bytes(), name


@pytest.mark.parametrize("fault", ["missing", "surplus"])
def test_weights_that_do_not_fit_are_one_error(twin: Twin, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(twin.folder, folder)
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
        twin.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_another_family_names_the_right_one(twin: Twin) -> None:
    for name in plugins.names("family"):
        if name != twin.name:
            options = ModelOptions(str(twin.folder), None, dtype="fp32")
            with pytest.raises(CheckpointError, match=f"model.family: {twin.name}"):
                plugins.load("family", name).load(options, None)


def test_code_in_a_checkpoint_is_never_run(
    twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes that only the folder's code has: refused or replaced, whatever a terminal answers."""
    folder = tmp_path / "with-code"
    shutil.copytree(twin.folder, folder)
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
        twin.load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("named", ["../elsewhere.safetensors", "/elsewhere.safetensors", 7, None])
def test_an_index_names_files_of_its_own_folder(twin: Twin, tmp_path: Path, named: Any) -> None:
    folder = tmp_path / "indexed"
    shutil.copytree(twin.folder, folder)
    file = next(iter(folder.glob("*.safetensors")))
    weight_map = dict.fromkeys(load_file(file), named)
    file.rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no file name"):
        twin.load(folder)


def test_heads_can_be_overridden_in_every_component(twin: Twin) -> None:
    for component in twin.family.sublayers:
        options = ModelOptions(None, twin.preset, overrides={component: {"heads": 2}})
        config = twin.family.model_config(options)
        assert twin.family.attention(config, component).heads == 2, component
        with torch.device("meta"):
            twin.family.skeleton(config)
