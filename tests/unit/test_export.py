"""What a run leaves for others gives the same logits, with none of our code."""

from __future__ import annotations

import argparse
import json
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

from tests import tiny
from tests.in_process import one_rank, train
from tests.unit.llava_material import FAMILY, logits_of, mixed

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
}
# Runs every card's snippet as its user would, in the run folder, and writes the logits beside.
DRIVER = """
import json, os, sys
from safetensors.torch import load_file, save_file
for folder, snippet in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    inputs, logits = load_file("inputs.safetensors"), {}
    torch = names["torch"]
    for row in range(len(inputs) // 2):
        given = {"input_ids": inputs[f"{row}.ids"]}
        if inputs[f"{row}.pixels"].numel():
            given["pixel_values"] = inputs[f"{row}.pixels"].to(names["model"].dtype)
        with torch.no_grad():
            logits[str(row)] = names["model"](**given).logits[0].float().contiguous()
    save_file(logits, "snippet.safetensors")
assert not any(name.split(".")[0] in ("mmtrain", "deepspeed") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Iterator[Path]:
    """Every run of RUNS trained, with inputs and mmtrain's own logits in its folder."""
    root = tmp_path_factory.mktemp("export")
    with one_rank():
        for name, sections in RUNS.items():
            data = tiny.run_data(tiny_checkpoint, digit_shards, root / name, **sections)
            data["components"] = sections.get("components", data["components"])
            train(data)
            write_logits(root / name)
        yield root


def write_logits(run_dir: Path) -> None:
    """The trained model's logits, unpadded, sample by sample."""
    from mmtrain.training.inference import ready_from_argument

    ready = ready_from_argument(str(run_dir), [], base=False)
    processor, inputs, logits = ready.assembled.processor, {}, {}
    for row, one in enumerate(mixed(processor)):
        batch = FAMILY.collate([one], processor)
        with torch.no_grad():
            logits[str(row)] = logits_of(ready.assembled.model, batch)[0].float().contiguous()
        inputs[f"{row}.ids"] = batch.tensors["input_ids"]
        inputs[f"{row}.pixels"] = torch.stack(list(one.pixels)) if one.pixels else torch.zeros(0)
    save_file(inputs, run_dir / "inputs.safetensors")
    save_file(logits, run_dir / "logits.safetensors")


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
def test_training_changed_the_logits(root: Path, tiny_checkpoint: Path, name: str) -> None:
    assert (
        worst(hugging_face_logits(tiny_checkpoint, root / name, "fp32"), logits(root, name)) > 0.1
    )


def logits(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "logits.safetensors")


def hugging_face_logits(folder: Path, run_dir: Path, dtype: str) -> dict[str, torch.Tensor]:
    """The logits of a plain folder, by transformers alone."""
    from transformers import LlavaForConditionalGeneration

    from mmtrain.models.weights import DTYPES

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    inputs = load_file(run_dir / "inputs.safetensors")
    found = {}
    for row in range(len(inputs) // 2):
        given: dict[str, Any] = {"input_ids": inputs[f"{row}.ids"]}
        if inputs[f"{row}.pixels"].numel():
            given["pixel_values"] = inputs[f"{row}.pixels"].to(model.dtype)
        with torch.no_grad():
            found[str(row)] = model(**given).logits[0].float()
    return found


@pytest.mark.parametrize("name", ["fp32", "two-adapters"])
def test_a_merged_folder_gives_the_same_logits(root: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from mmtrain.commands import export

    out = tmp_path / "merged"
    assert export.run(argparse.Namespace(run=str(root / name), out=str(out))) == 0
    assert worst(hugging_face_logits(out, root / name, "fp32"), logits(root, name)) <= TOLERANCE
    processor = AutoProcessor.from_pretrained(out)
    assert "5</s>" in processor.tokenizer.decode(processor.tokenizer(" 5</s>")["input_ids"])


def test_export_refuses_a_folder_that_is_not_empty(root: Path) -> None:
    from mmtrain.commands import export
    from mmtrain.errors import MmtrainError

    with pytest.raises(MmtrainError, match="is not empty"):
        export.run(argparse.Namespace(run=str(root / "fp32"), out=str(root)))


def test_the_adapter_folder_is_standard(root: Path, tiny_checkpoint: Path) -> None:
    from peft import LoraConfig

    folder = root / "fp32" / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.base_model_name_or_path == str(tiny_checkpoint)
    with safe_open(folder / "adapter_model.safetensors", "pt") as reader:
        names = list(reader.keys())
    assert len(names) == 4 * 7 * 2
    assert all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", name) for name in names)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: peft" in card
