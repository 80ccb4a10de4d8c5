"""Original folders hold `tokenizer.model` only: what is read from it, against sentencepiece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from mmtrain.models.families.llava import SYSTEM
from mmtrain.models.interface import Example
from mmtrain.models.text import IGNORED
from tests.unit.llava_material import load, mixed, write_lively
from tests.unit.llava_original import load_original, write_with_sentencepiece

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sentencepiece")
    return write_with_sentencepiece(write_lively(base), base / "original")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_original(folder).processor


def spelled(processor: Any, ids: Sequence[int]) -> str:
    """Tokens written one after another: '_' where one begins with a space."""
    text = "".join(processor.tokenizer.convert_ids_to_tokens(list(ids))).replace("\u2581", "_")
    pictures = text.count("<image>")
    return text.replace("<image>" * pictures, f"<image>*{pictures}") if pictures else text


def readable(processor: Any, one: Example) -> str:
    """As in prompts.txt: stretches without loss behind a dot, with loss behind an arrow."""
    lines, start = [f"=== {one.id}: {len(one.pixels)} picture(s)"], 0
    has_loss = [label != IGNORED for label in one.labels]
    for end in range(1, len(has_loss) + 1):
        if end == len(has_loss) or has_loss[end] != has_loss[start]:
            sign = "loss >" if has_loss[start] else "     ."
            lines.append(f"{sign}{spelled(processor, one.input_ids[start:end])}|")
            start = end
    return "\n".join(lines) + "\n"


def test_prompts_are_those_of_training(processor: Any) -> None:
    found = "\n".join(readable(processor, one) for one in mixed(processor))
    assert found == (GOLDEN / "sentencepiece_prompts.txt").read_text(encoding="utf-8")


def test_tokens_are_those_of_training(folder: Path, processor: Any) -> None:
    """LLaVA's code tokenised the text before and behind the picture one by one."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    picture, text, _ = mixed(processor)
    before = library.encode(f"{SYSTEM} USER: ")
    behind = library.encode("\nWhich digit is in the picture? ASSISTANT: 5")
    space = library.piece_to_id("\u2581")
    assert before[-1] == behind[0] == space, "the golden spaces around a picture"
    pictures = [processor.image_token_id] * 16
    assert picture.input_ids == [BOS, *before, *pictures, *behind, EOS]
    plain = library.encode(f"{SYSTEM} USER: Say 7. ASSISTANT: 7 and then 8")
    assert text.input_ids == [BOS, *plain, EOS]
    # Loss falls on all of the answer, its leading space included, and on the end.
    answer = len(library.encode("7 and then 8")) + 1
    assert [label != IGNORED for label in text.labels].index(True) == len(text.labels) - answer


def test_a_saved_folder_gives_the_same_samples(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    from tests.unit.llava_material import FAMILY

    loaded = load_original(folder)
    state = dict(loaded.model.named_parameters())
    FAMILY.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    again = load(tmp_path / "saved").processor
    for one, other in zip(mixed(loaded.processor), mixed(again), strict=True):
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        assert all(map(torch.equal, one.pixels, other.pixels))
    # By the class that its settings name, too.
    plain = LlamaTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = f"{SYSTEM} USER: <image>\nWhy? ASSISTANT:"
    assert plain(text).input_ids == loaded.processor.tokenizer(text).input_ids
