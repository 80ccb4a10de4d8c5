"""What LLaVA really sees: tokens decoded again, answers marked, and what truncation may cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import DataError
from mmtrain.models.interface import Example
from mmtrain.models.text import IGNORED, prompt_ids
from tests.unit.llava_material import (
    decoded,
    example,
    image,
    load,
    mixed,
    readable,
    spaced,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"
IMAGE_TOKENS = 16  # (32 / 8) squared


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Any:
    return load(tiny_checkpoint).processor


def test_prompts_are_the_published_form(processor: Any) -> None:
    examples = [*mixed(processor), spaced(processor)]
    found = "\n".join(readable(processor, one) for one in examples)
    assert found == (GOLDEN / "prompts.txt").read_text(encoding="utf-8")


def test_several_images_stand_before_the_first_question(processor: Any) -> None:
    one = example(processor, "two", "Same?", "no", [image(1), image(2)])
    assert len(one.pixels) == 2
    text = decoded(processor, one.input_ids)
    assert f" USER: <image>*{IMAGE_TOKENS}\n<image>*{IMAGE_TOKENS}\nSame? ASSISTANT:" in text


def test_generation_starts_where_the_last_answer_would(processor: Any) -> None:
    for one in mixed(processor):
        prompt = prompt_ids(one.input_ids, one.labels)
        assert decoded(processor, prompt).endswith(" ASSISTANT:")
        assert one.labels[len(prompt)] != IGNORED
        assert all(label != IGNORED for label in one.labels[len(prompt) :])


LONG = "Which digit of these is in the picture? " * 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("surplus", [1, 30, 90])
def test_truncation_spares_images_and_answers(processor: Any, side: str, surplus: int) -> None:
    def encoded(limit: int) -> Example:
        earlier = [("Which digit?", "3 or so")]
        images = [image(1)]
        return example(processor, "long", LONG, "4 and 5", images, earlier, limit, side)

    whole = encoded(10_000)
    limit = len(whole.input_ids) - surplus
    cut = encoded(limit)
    assert len(cut.input_ids) == len(cut.labels) == limit
    assert cut.input_ids.count(processor.image_token_id) == IMAGE_TOKENS
    assert answers(cut) == answers(whole)
    # The model must still be told that it is its turn.
    assert decoded(processor, prompt_ids(cut.input_ids, cut.labels)).endswith(" ASSISTANT:")
    assert cut.input_ids[0] == whole.input_ids[0] == processor.tokenizer.bos_token_id
    assert is_subsequence(cut.input_ids, whole.input_ids)
    system = decoded(processor, whole.input_ids[1:20])
    assert decoded(processor, cut.input_ids[1:20]).startswith(system) == (side == "right")


def answers(one: Example) -> list[int]:
    return [label for label in one.labels if label != IGNORED]


def is_subsequence(short: Sequence[int], whole: Sequence[int]) -> bool:
    remaining = iter(whole)
    return all(token in remaining for token in short)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_image_that_does_not_fit_is_an_error(processor: Any, side: str) -> None:
    arguments: dict[str, Any] = {"question": "Which?", "target": "5", "images": [image(1)]}
    whole = example(processor, "big", **arguments)
    minimum = 1 + IMAGE_TOKENS + processor.num_cue_tokens + len(answers(whole))
    fits = example(processor, "big", **arguments, max_length=minimum, side=side)
    assert len(fits.input_ids) == minimum
    with pytest.raises(DataError, match=f"sample big: .* {minimum} tokens, data.max_length is"):
        example(processor, "big", **arguments, max_length=minimum - 1, side=side)
    with pytest.raises(DataError, match="sample big: .*data.max_length is 10"):
        example(processor, "big", **arguments, max_length=10, side=side)


def test_empty_answers_still_learn_to_stop(processor: Any) -> None:
    one = example(processor, "empty", "Say nothing.", "")
    assert answers(one)[-1] == processor.tokenizer.eos_token_id
