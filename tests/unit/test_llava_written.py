"""What we write, transformers reads as we do: images padded to squares, prompts of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from mmtrain.models.interface import Example
from mmtrain.models.text import prompt_ids
from tests.unit.llava_material import FAMILY, example, image, load, write_lively
from tests.unit.llava_original import load_original, write_with_sentencepiece

# Question and answer, in turns; the last answer is to be given.
TALKS = {
    "one turn": ["Which digit is in the picture?", "5"],
    "spaces": ["\n Which  digit? ", " 3 ", " And now? ", "2"],
    "nothing said": [" ", "5"],
}


@pytest.fixture(scope="module", params=["hugging face", "legacy", "not legacy"])
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(our processor of a folder, transformers' of what we write of it)."""
    from transformers import AutoProcessor

    base = tmp_path_factory.mktemp("written")
    tiny_model = write_lively(base)
    if request.param == "hugging face":
        loaded = load(tiny_model)
    else:
        legacy = request.param == "legacy"
        loaded = load_original(
            write_with_sentencepiece(tiny_model, base / "original", legacy=legacy)
        )
    state = dict(loaded.model.named_parameters())
    FAMILY.code.save(loaded.model, loaded.processor, state, base / "saved")
    return loaded.processor, AutoProcessor.from_pretrained(base / "saved")


def encoded(processor: Any, talk: Sequence[str], images: Sequence[Image.Image]) -> Example:
    *earlier, (question, answer) = zip(talk[::2], talk[1::2], strict=True)
    return example(processor, "a", question, answer, images, earlier)


def messages(talk: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """As transformers wants them."""
    found: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": said}]}
        for role, said in zip(("user", "assistant") * len(talk), talk[:-1], strict=False)
    ]
    shown = [{"type": "image", "image": one} for one in images]
    found[0]["content"] = [*shown, *found[0]["content"]]
    return found


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("size", [(90, 40), (41, 90), (50, 50), (7, 200)])
def test_images_and_prompt_are_those_of_training(
    read: Any, talk: str, size: tuple[int, int]
) -> None:
    ours, theirs = read
    shown = [image(3).resize(size)]
    wanted = encoded(ours, TALKS[talk], shown)
    found = theirs.apply_chat_template(
        messages(TALKS[talk], shown),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert found["input_ids"][0].tolist() == prompt_ids(wanted.input_ids, wanted.labels)
    # The same steps on the same bytes. With torchvision installed transformers resizes by that.
    assert torch.equal(found["pixel_values"][0], wanted.pixels[0])


@pytest.mark.parametrize("images", [0, 2])
def test_other_numbers_of_images(read: Any, images: int) -> None:
    ours, theirs = read
    shown = [image(number) for number in range(images)]
    talk = TALKS["spaces"]
    text = theirs.apply_chat_template(messages(talk, shown), add_generation_prompt=True)
    wanted = encoded(ours, talk, shown)
    found = theirs(text=text, images=shown or None)["input_ids"][0]
    assert list(found) == prompt_ids(wanted.input_ids, wanted.labels)
    # Plain strings and a system message of one's own.
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? "}]
    text = theirs.apply_chat_template(plain, add_generation_prompt=True)
    assert text == "Be brief. USER:  Why?  ASSISTANT:"


def test_whole_conversations_end_as_in_training(read: Any) -> None:
    ours, theirs = read
    talk = [*TALKS["spaces"], "more"]
    text = theirs.apply_chat_template(messages(talk, []))
    assert text.endswith("</s>USER:  And now?  ASSISTANT: 2</s>")
    assert theirs(text=text)["input_ids"][0] == encoded(ours, talk[:-1], []).input_ids
