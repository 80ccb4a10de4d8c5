"""Original folders hold `tokenizer.model` only: what is read from it, against sentencepiece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from mmtrain.models.families.llava.prompts import SYSTEM
from mmtrain.models.interface import Example
from mmtrain.models.text import IGNORED
from tests.unit.llava_material import FAMILY, example, image, load, mixed, spaced, write_lively
from tests.unit.llava_original import load_original, write_with_sentencepiece
from tests.unit.sentencepiece_texts import texts

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
    images = text.count("<image>")
    return text.replace("<image>" * images, f"<image>*{images}") if images else text


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
    examples = [*mixed(processor), spaced(processor)]
    found = "\n".join(readable(processor, one) for one in examples)
    assert found == (GOLDEN / "sentencepiece_prompts.txt").read_text(encoding="utf-8")


def as_llava(library: Any, prompt: str, image: int, legacy: bool) -> list[int]:
    """What LLaVA's code makes of a prompt: what lies around images is tokenised one by one.

    Its tokenizer cuts such a stretch at </s>, and without `legacy` takes the space away again that
    the library puts before all but the first part. A newline before it is cut apart, and takes it.
    """
    ids = [BOS]
    for number, stretch in enumerate(prompt.split("<image>")):
        ids += [image] * (16 if number else 0)
        for place, part in enumerate(stretch.split("</s>")):
            ids += [EOS] * (place > 0)
            bare = place > 0 and not legacy
            ids += library.encode(f"\n{part}")[2:] if bare else library.encode(part)
    return ids


def example_of(processor: Any, turns: Sequence[str], images: int) -> list[int]:
    *earlier, (question, answer) = zip(turns[::2], turns[1::2], strict=True)
    shown = [image(number) for number in range(images)]
    return example(processor, "a", question, answer, shown, earlier, 5000).input_ids


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_are_those_of_training(tmp_path: Path, legacy: bool) -> None:
    tiny_model = write_lively(tmp_path)
    folder = write_with_sentencepiece(tiny_model, tmp_path / "original", legacy=legacy)
    processor = load_original(folder).processor
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    said = [text for text in texts(80) if "<" not in text]
    for images in (0, 1, 2):
        for start in range(0, len(said) - 4, 4):
            turns = said[start : start + 4]
            first, *others = turns
            if images:
                first = "<image>\n" * images + first.strip()
            prompt = f"{SYSTEM} USER: {first} ASSISTANT: {others[0]}</s>"
            prompt += f"USER: {others[1]} ASSISTANT: {others[2]}</s>"
            wanted = as_llava(library, prompt, processor.image_token_id, legacy)
            assert example_of(processor, turns, images) == wanted
    # With nothing said beside an image, its turn ends with it.
    prompt = f"{SYSTEM} USER: <image> ASSISTANT: 5</s>"
    wanted = as_llava(library, prompt, processor.image_token_id, legacy)
    assert example_of(processor, (" \n", "5"), 1) == wanted


def test_the_loss_falls_on_the_answer_its_space_and_the_end(folder: Path, processor: Any) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = mixed(processor)[1]
    answer = [label for label in text.labels if label != IGNORED]
    assert answer == [*library.encode("7 and then 8"), EOS] == text.input_ids[-len(answer) :]


def test_a_saved_folder_gives_the_same_samples(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer

    loaded = load_original(folder)
    state = dict(loaded.model.named_parameters())
    FAMILY.code.save(loaded.model, loaded.processor, state, tmp_path / "saved")
    again = load(tmp_path / "saved").processor
    for one, other in zip(mixed(loaded.processor), mixed(again), strict=True):
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        assert all(map(torch.equal, one.pixels, other.pixels))
    # Whoever reads it; by the class that its settings name, too.
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    wanted = [library.encode(text) for text in texts(600)]
    prompt = f"{SYSTEM} USER: <image>\nWhy? ASSISTANT: 4</s>USER: So? ASSISTANT:"
    for reader in (AutoTokenizer, LlamaTokenizer):
        plain = reader.from_pretrained(str(tmp_path / "saved"))
        assert plain(texts(600), add_special_tokens=False).input_ids == wanted
        assert plain(prompt).input_ids == loaded.processor.tokenizer(prompt).input_ids
