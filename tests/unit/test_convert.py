"""`mmtrain convert`: what it writes, what it proves, and that failures leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtrain.__main__ import main
from tests.unit.folder_faults import copied, edit_json, stored_tensors
from tests.unit.llava_material import FAMILY, inputs_of, load, logits_of, mixed, write_lively
from tests.unit.llava_original import load_original, write_original

TOLERANCE = 1e-5
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def tiny_model(base: Path) -> Path:
    return write_lively(base)


@pytest.fixture(scope="module")
def original(tiny_model: Path, base: Path) -> Path:
    return write_original(tiny_model, base / "original", tower="beside", kind="bin", shards=2)


@pytest.fixture(scope="module")
def converted(original: Path, base: Path) -> Path:
    target = base / "converted"
    tower = str(base / "original-tower")
    command = ["convert", str(original), str(target), "--dtype", "fp32", "--vision-tower", tower]
    assert main(command) == 0
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_transformers_own_forward_gives_the_sources_logits(
    original: Path, converted: Path, base: Path
) -> None:
    """Found by nothing but the folder, as anybody else would load it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(converted)
    source = load_original(original, base / "original-tower")
    size = source.config.text_config.vocab_size
    examples = mixed(source.processor)
    with torch.no_grad():
        ours = logits_of(source.model, FAMILY.code.collate(examples, source.processor))
    for row, one in enumerate(examples):
        with torch.no_grad():
            theirs = model(**inputs_of(one, processor)).logits[0]
        assert theirs.shape[-1] > size and theirs.abs().max() > 0.5
        difference = (ours[row, : len(one.input_ids)] - theirs[:, :size]).abs().max()
        assert difference <= TOLERANCE * theirs.abs().max(), (one.id, float(difference))
    answer = model.generate(**inputs_of(examples[0], processor), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > len(examples[0].input_ids)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == size


def test_the_vocabulary_is_padded_with_mean_rows(tiny_model: Path, converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    image_token = config["image_token_index"]
    size = config["text_config"]["vocab_size"]
    assert image_token < size and size % 64 == 0 and size - image_token <= 64
    found = tensors_of(converted)
    stored = stored_tensors(tiny_model)
    for name, old in ((EMBEDDING, "language_model.model.embed_tokens.weight"), (HEAD, None)):
        rows = stored[old or "language_model.lm_head.weight"][:image_token]
        assert torch.equal(found[name][:image_token], rows)
        assert found[name].shape[0] == size
        assert torch.equal(found[name][image_token:], rows.mean(0).expand(size - image_token, -1))


def test_samples_are_read_alike(original: Path, converted: Path, base: Path) -> None:
    source = load_original(original, base / "original-tower").processor
    for one, other in zip(mixed(source), mixed(load(converted).processor), strict=True):
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        assert all(map(torch.equal, one.pixels, other.pixels))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_that_need_no_padding_stay_bit_equal(
    tiny_model: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "again"
    target.mkdir()  # an empty folder is as good as none
    assert (
        main(["convert", str(tiny_model), str(target), "--family", "llava", "--dtype", dtype]) == 0
    )
    out = capsys.readouterr().out
    assert "largest difference of logits" in out and f"in {dtype}" in out
    before = dict(load(tiny_model).model.named_parameters())
    after = tensors_of(target)
    assert set(before) == set(after)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


# --- failures: one line, exit code 2, nothing left ------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], source: Path, target: Path, *more: str) -> str:
    """The one line of a refused conversion; nothing was left behind."""
    before = sorted(target.parent.iterdir())
    assert main(["convert", str(source), str(target), *more]) == 2
    assert sorted(target.parent.iterdir()) == before
    lines = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_folder_in_use_is_left_alone(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("here")
    assert "is not empty" in refused(capsys, tiny_model, tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "here"


def test_other_sources(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    assert "is no folder" in refused(capsys, tmp_path / "nothing", target)
    other = copied(tiny_model, tmp_path / "other")
    edit_json(other / "config.json", model_type="lava")
    line = refused(capsys, other, target)
    assert "no family reads a 'lava' checkpoint" in line and "did you mean 'llava'?" in line


def test_a_missing_tower(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, original, tmp_path / "target")
    assert "mm_vision_tower" in line and "--vision-tower" in line


def test_a_full_disk_is_known_before(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "0.1 GiB, " in refused(capsys, tiny_model, tmp_path / "target")


def test_a_disk_that_fills_up(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmtrain.models.building.save_file", full)
    assert "No space left" in refused(capsys, tiny_model, tmp_path / "target")


@pytest.mark.parametrize("what", ["weights", "pixels"])
def test_another_model_is_never_put_in_place(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    honest = FAMILY.code.save

    def harmed(model: Any, processor: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
        name = "model.language_model.norm.weight"
        state = {**state, name: state[name] * 1.001} if what == "weights" else state
        honest(model, processor, state, folder)
        if what == "pixels":
            settings = json.loads((folder / "processor_config.json").read_text())
            settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
            (folder / "processor_config.json").write_text(json.dumps(settings))

    monkeypatch.setattr(FAMILY.code, "save", harmed)
    line = refused(capsys, tiny_model, tmp_path / "target", "--dtype", "fp32")
    named = {"weights": "computes other logits", "pixels": "makes other pixel_values"}
    assert named[what] in line
