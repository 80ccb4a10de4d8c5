"""What a run leaves for others gives the same logits, with none of our code."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmtrain.resolve import resolve
from tests import tiny
from tests.in_process import one_rank, train
from tests.soaks import cases
from tests.unit import llava_material, qwen2_vl_material
from tests.unit.one_by_one import logits_one_by_one

TOLERANCE = 1e-5
LORA = {"mode": "peft", "method": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
# name -> sections of the run file
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "two-adapters": {
        "components": {
            "connector": {"mode": "full"},
            "llm": {**LORA, "layers": "last-2"},
            "vision": {**LORA, "sublayers": {"attn": ["q", "v"]}},
        }
    },
    "qwen2_vl": {"model": {"family": "qwen2_vl", "max_pixels": 30 * 30}},
}
# Runs every card's snippet as its user would, in the run folder, and writes the logits beside, and
# what the snippet's processor makes of an image.
DRIVER = """
import json, os, sys
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from tests.unit.one_by_one import logits_one_by_one
for folder, snippet in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    save_file(logits_one_by_one(names["model"], Path(folder)), "snippet.safetensors")
    images = names.get("image_processor") or names["processor"].image_processor
    seen = images(Image.open("image.png"), return_tensors="pt")["pixel_values"]
    save_file({"seen": seen.contiguous()}, "seen.safetensors")
assert not any(name.split(".")[0] in ("mmtrain", "deepspeed") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Iterator[Path]:
    """Every run of RUNS trained, with inputs and mmtrain's own logits in its folder."""
    root = tmp_path_factory.mktemp("export")
    other = qwen2_vl_material.write_plain(root / "base", "tiny")
    with one_rank():
        for name, sections in RUNS.items():
            base = other if name == "qwen2_vl" else tiny_checkpoint
            data = tiny.run_data(base, digit_shards, root / name, **sections)
            data["components"] = sections.get("components", data["components"])
            train(data)
            write_logits(root / name)
        yield root


def write_logits(run_dir: Path) -> None:
    """The trained model's logits, unpadded, sample by sample, and an image as it sees it."""
    from mmtrain.training.inference import ready_from_argument

    assembled = ready_from_argument(str(run_dir), [], base=False).assembled
    is_llava = assembled.family is llava_material.FAMILY
    material: Any = llava_material if is_llava else qwen2_vl_material
    inputs, logits = {}, {}
    for row, one in enumerate(material.mixed(assembled.processor)):
        batch = assembled.family.code.collate([one], assembled.processor)
        with torch.no_grad():
            logits[str(row)] = material.logits_of(assembled.model, batch)[0].float().contiguous()
        given = material.inputs_of(one, assembled.processor)
        inputs |= {f"{row}.{name}": tensor for name, tensor in given.items()}
    save_file(inputs, run_dir / "inputs.safetensors")
    save_file(logits, run_dir / "logits.safetensors")
    image = material.image(1).resize((90, 40))
    image.save(run_dir / "image.png")
    seen = material.example(assembled.processor, "seen", "Which?", "5", [image])
    save_file({"seen": torch.cat(list(seen.pixels))}, run_dir / "image.safetensors")


def snippet_of(run_dir: Path) -> str:
    cards = sorted((run_dir / "adapter").rglob("README.md"))
    snippets = {re.findall(r"```python\n(.*?)```", card.read_text(), re.S)[0] for card in cards}
    assert len(snippets) == 1, "the cards of one run must load it the same way"
    return snippets.pop()


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(wanted) and found
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


@pytest.fixture(scope="module")
def from_snippets(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    snippets = {str(root / name): snippet_of(root / name) for name in RUNS}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(snippets),
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return {name: load_file(root / name / "snippet.safetensors") for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_the_cards_snippet_gives_the_same_logits(
    root: Path, from_snippets: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    imported = set(re.findall(r"^(?:from|import) (\w+)", snippet_of(root / name), re.M))
    assert imported <= {"torch", "transformers", "peft", "safetensors"}
    wanted = load_file(root / name / "logits.safetensors")
    assert worst(from_snippets[name], wanted) <= TOLERANCE


@pytest.mark.parametrize("name", RUNS)
def test_the_cards_processor_sees_what_training_saw(
    root: Path, from_snippets: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    seen = load_file(root / name / "seen.safetensors")
    wanted = load_file(root / name / "image.safetensors")["seen"]
    assert torch.equal(seen["seen"].reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", RUNS)
def test_training_changed_the_logits(root: Path, name: str) -> None:
    base = json.loads(next((root / name).rglob("adapter_config.json")).read_text())
    plain = hugging_face_logits(Path(base["base_model_name_or_path"]), root / name)
    assert worst(plain, logits(root, name)) > 0.1


@pytest.mark.parametrize("name", ["fp32", "qwen2_vl"])
def test_peft_finds_the_base_by_itself(root: Path, name: str) -> None:
    from peft import AutoPeftModel

    model = AutoPeftModel.from_pretrained(root / name / "adapter").eval()
    # What was trained in full lies beside.
    full = load_file(root / name / "full" / "connector.safetensors")
    assert not model.get_base_model().load_state_dict(full, strict=False).unexpected_keys
    assert worst(logits_one_by_one(model, root / name), logits(root, name)) <= TOLERANCE


def test_a_base_that_only_mmtrain_reads_names_no_class(
    root: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from mmtrain.assemble import build_model
    from mmtrain.training.export import export_trained
    from mmtrain.training.trained import chosen_checkpoint

    model = {"overrides": {"llm": {"activation": "gelu"}}}
    config = resolve(tiny.run_data(tiny_checkpoint, root, tmp_path, model=model))
    assembled = build_model(config, None, trains=False)
    export_trained(chosen_checkpoint(root / "fp32"), tmp_path, config, assembled)
    assert "auto_mapping" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert "from mmtrain" in snippet_of(tmp_path)


def logits(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "logits.safetensors")


def hugging_face_logits(folder: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """The logits of a plain folder in fp32, by transformers alone."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return logits_one_by_one(model.eval(), run_dir)


@pytest.mark.parametrize("name", ["fp32", "two-adapters"])
def test_a_merged_folder_gives_the_same_logits(
    root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    from mmtrain import distributed
    from mmtrain.commands import export

    # A command leaves its group; the tests of this process share one (tests.in_process).
    monkeypatch.setattr(distributed, "shut_down", lambda: None)
    out = tmp_path / "merged"
    assert export.run(asked(root / name, out)) == 0
    assert worst(hugging_face_logits(out, root / name), logits(root, name)) <= TOLERANCE
    processor = AutoProcessor.from_pretrained(out)
    assert "5</s>" in processor.tokenizer.decode(processor.tokenizer(" 5</s>")["input_ids"])


def test_export_refuses_a_folder_that_is_not_empty(root: Path) -> None:
    from mmtrain.commands import export
    from mmtrain.errors import MmtrainError

    with pytest.raises(MmtrainError, match="is not empty"):
        export.run(asked(root / "fp32", root))


@pytest.mark.parametrize("name", cases(["fp32"], ["fp32", "two-adapters", "qwen2_vl"]))
def test_an_adapter_folder_is_read_back(
    root: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mmtrain import distributed
    from mmtrain.commands import export

    monkeypatch.setattr(distributed, "shut_down", lambda: None)
    out = tmp_path / "adapter"
    assert export.run(asked(root / name, out, "peft")) == 0
    assert "its logits are within" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"adapter", "run.yaml"}


def test_what_gives_other_logits_is_not_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtrain.commands import export
    from mmtrain.errors import CheckpointError
    from mmtrain.training import exporting

    def forgetful(run_dir: Path, folder: Path) -> None:
        copy(run_dir, folder)
        path = folder / "full" / "connector.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)

    copy = exporting._copy_exports
    monkeypatch.setattr(exporting, "_copy_exports", forgetful)
    with pytest.raises(CheckpointError, match="gives other logits than the run"):
        export.run(asked(root / "fp32", tmp_path / "out", "peft"))
    assert not any(tmp_path.iterdir())


def test_vllm_is_told_why_not(root: Path, tmp_path: Path) -> None:
    from mmtrain.commands import export
    from mmtrain.errors import ConfigError

    with pytest.raises(ConfigError, match="use --to merged") as caught:
        export.run(asked(root / "two-adapters", tmp_path / "out", "vllm"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "components.connector",
        "components",
        "components.vision",
    ]


def asked(run: Path, out: Path, form: str = "merged") -> argparse.Namespace:
    return argparse.Namespace(run=str(run), out=str(out), to=form)


def test_the_adapter_folder_is_standard(root: Path, tiny_checkpoint: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoProcessor

    folder = root / "fp32" / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    # What stock tools look for beside an adapter.
    assert AutoProcessor.from_pretrained(folder).tokenizer is not None
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.base_model_name_or_path == str(tiny_checkpoint)
    with safe_open(folder / "adapter_model.safetensors", "pt") as reader:
        names = list(reader.keys())
    assert len(names) == 4 * 7 * 2
    assert all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", name) for name in names)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: peft" in card
