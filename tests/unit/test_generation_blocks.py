"""The papers' generation settings: blocks by name, keys beside them, plain values in what is saved.

That transformers obeys them in every family is tests/contracts/test_families_run.py's matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.generation import BLOCKS
from mmtrain.config.load import dump_run, load_run_file
from mmtrain.config.schema import GenerationConfig
from mmtrain.errors import ConfigError
from mmtrain.resolve import resolve

MODEL = {"family": "llava", "preset": "tiny"}


def settings(generation: dict[str, Any], *overrides: str) -> dict[str, Any]:
    found = resolve({"model": MODEL, "generation": generation}, overrides)
    return found.generation.model_dump(exclude={"like", "batch_size"})


def problems(generation: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve({"model": MODEL, "generation": generation})
    return caught.value.problems


def test_every_block_says_everything_and_is_valid() -> None:
    keys = set(GenerationConfig.model_fields) - {"like", "batch_size"}
    for name, block in BLOCKS.items():
        assert set(block) == keys, name
        assert settings({"like": name}) == block


def test_the_papers_values() -> None:
    """As their configurations have them: a change here is a change of what is reproduced."""
    caption = {"max_new_tokens": 50, "min_new_tokens": 6, "num_beams": 5}
    assert settings({"like": "wang2024_captions"}) == {
        **caption,
        "length_penalty": 1.0,
        "repetition_penalty": 1.5,
    }
    okvqa = settings({"like": "wang2024_vqa"})
    assert (okvqa["num_beams"], okvqa["length_penalty"], okvqa["max_new_tokens"]) == (5, -1, 100)
    qwen = settings({"like": "zhou2024_qwen_vqa"})
    assert (qwen["num_beams"], qwen["repetition_penalty"], qwen["max_new_tokens"]) == (1, 1, 10)


def test_keys_beside_a_block_count_more() -> None:
    found = settings({"like": "wang2024_vqa", "num_beams": 2})
    assert found == {**BLOCKS["wang2024_vqa"], "num_beams": 2}
    by_hand = ["generation.num_beams=3", "generation.like=wang2024_vqa"]
    assert settings({}, *by_hand) == {**BLOCKS["wang2024_vqa"], "num_beams": 3}


def test_what_is_saved_is_plain_and_another_block_replaces_it(tmp_path: Path) -> None:
    saved = tmp_path / "run.yaml"
    block = {"like": "wang2024_captions", "batch_size": 4}
    saved.write_text(dump_run(resolve({"model": MODEL, "generation": block})))
    assert "wang2024" not in saved.read_text() and "min_new_tokens: 6" in saved.read_text()
    assert load_run_file(saved).generation.min_new_tokens == 6
    other = load_run_file(saved, ["generation.like=zhou2024"]).generation
    assert other.model_dump(exclude={"like", "batch_size"}) == BLOCKS["zhou2024"]
    assert other.batch_size == 4, "no block says it"


def test_faults_name_the_remedy() -> None:
    assert problems({"like": "wang2024_vqas"}) == [
        "generation: there is no block 'wang2024_vqas' for 'like'; did you mean 'wang2024_vqa'?"
    ]
    assert problems({"min_new_tokens": 40}) == [
        "generation: 'min_new_tokens' 40 is above 'max_new_tokens' 32; lower it"
    ]
    (problem,) = problems({"like": 3})
    assert problem.startswith("generation.like: got 3; give text")
