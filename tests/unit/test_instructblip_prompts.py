"""What InstructBLIP really sees: tokens decoded again, answers marked, and what may be cut."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import DataError
from mmtrain.models.interface import Example
from tests.unit.instructblip_material import (
    FAMILY,
    TEXTS,
    TINY_MODELS,
    example,
    image,
    load,
    mixed,
    text_and_answer,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "instructblip"
QUERIES = 8
SIDES = ("left", "right")
Processors = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both folders."""
    folder = tmp_path_factory.mktemp("instructblip")
    for preset in TINY_MODELS:
        FAMILY.code.write_tiny(folder / preset, TEXTS, 0, preset)
    return folder


@pytest.fixture(scope="module")
def processors(folders: Path) -> Processors:
    return {preset: load(folders / preset).processor for preset in TINY_MODELS}


@pytest.fixture(params=TINY_MODELS)
def processor(request: pytest.FixtureRequest, processors: Processors) -> Any:
    return processors[request.param]


def decoded(processor: Any, ids: Sequence[int]) -> str:
    """The text of tokens, image tokens counted."""
    parts = []
    for is_image, group in groupby(ids, lambda one: one == processor.image_token_id):
        run = list(group)
        text = f"<image>*{len(run)}" if is_image else processor.tokenizer.decode(run)
        parts.append(text)
    return "".join(parts)


def readable(processor: Any, one: Example) -> str:
    """The prompt behind a dot, what has loss behind an arrow, the Q-Former's text behind a Q."""
    prompt, answer = text_and_answer(one)
    reads = processor.qformer_tokenizer.decode(one.extras["instruction_ids"])
    lines = [
        f"=== {one.id}: {len(one.pixels)} picture(s)",
        f"Q-Former . {reads}|",
        f"     LLM . {decoded(processor, prompt)}|",
        f"    loss > {decoded(processor, answer)}|",
    ]
    return "\n".join(lines) + "\n"


def test_prompts_are_the_published_form(processors: Processors) -> None:
    parts = []
    for preset, processor in processors.items():
        parts.append(f"##### {preset}\n")
        parts += [readable(processor, one) for one in mixed(processor)]
    assert "\n".join(parts) == (GOLDEN / "prompts.txt").read_text(encoding="utf-8")


def test_labels_are_the_answer_alone(processors: Processors) -> None:
    for preset, processor in processors.items():
        for one in mixed(processor):
            prompt, answer = text_and_answer(one)
            assert answer[-1] == processor.tokenizer.eos_token_id
            if preset == "tiny":
                assert (one.input_ids, one.labels) == (prompt, answer)
            else:
                assert one.input_ids == prompt + answer
                assert one.labels == [-100] * len(prompt) + answer


def test_several_images_stand_first(processor: Any) -> None:
    one = example(processor, "two", "Which digit?", "no", [image(1), image(2)])
    assert len(one.pixels) == 2
    assert decoded(processor, one.input_ids).startswith(f"<image>*{2 * QUERIES}")
    assert processor.image_token_id not in one.input_ids[2 * QUERIES :]


def test_the_frame_of_each_tokenizer(processors: Processors) -> None:
    for preset, framed in (("tiny", (False, True)), ("tiny-vicuna", (True, False))):
        processor = processors[preset]
        one = example(processor, "a", "Which digit?", "5", [image(1)])
        text = text_and_answer(one)[0][QUERIES:]
        tokenizer = processor.tokenizer
        assert (text[0] == tokenizer.bos_token_id, text[-1] == tokenizer.eos_token_id) == framed


LONG = "Which digit of these is in the picture? " * 4


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_images", [0, 1])
@pytest.mark.parametrize("surplus", [1, 20])
def test_truncation_spares_images_frames_and_answers(
    processor: Any, side: str, num_images: int, surplus: int
) -> None:
    def encoded(limit: int) -> Example:
        images = [image(number) for number in range(num_images)]
        return example(processor, "long", LONG, "7 and then 8", images, max_length=limit, side=side)

    whole, answer = text_and_answer(encoded(10_000))
    limit = len(whole) - surplus
    cut, same = text_and_answer(encoded(limit))
    assert same == answer and len(cut) == limit
    images = QUERIES * num_images
    assert cut[:images] == whole[:images] == [processor.image_token_id] * images
    # Begin and end tokens stay; the text loses its beginning or its end.
    framed = processor.tokenizer("Which", return_special_tokens_mask=True)["special_tokens_mask"]
    head, tail = images + framed[0], framed[-1]
    assert cut[:head] == whole[:head] and cut[limit - tail :] == whole[len(whole) - tail :]
    body, kept = whole[head : len(whole) - tail], cut[head : limit - tail]
    assert kept == (body[surplus:] if side == "left" else body[:-surplus])


@pytest.mark.parametrize("side", SIDES)
def test_the_instruction_is_cut_on_the_same_side(processor: Any, side: str) -> None:
    def instruction(limit: int) -> list[int]:
        one = example(
            processor, "a", "Which?", "5", [image(1)], (), LONG, max_length=limit, side=side
        )
        return one.extras["instruction_ids"]

    whole = instruction(10_000)
    limit = len(whole) + QUERIES - 5
    body, kept = whole[1:-1], instruction(limit)[1:-1]
    assert kept == (body[5:] if side == "left" else body[:-5])
    assert (instruction(limit)[0], instruction(limit)[-1]) == (whole[0], whole[-1])


def test_the_instruction_never_outgrows_its_positions(processor: Any) -> None:
    one = example(processor, "a", "Which?", "5", [image(1)], instruction=LONG * 9, max_length=9999)
    assert len(one.extras["instruction_ids"]) == processor.instruction_positions


@pytest.mark.parametrize("side", SIDES)
def test_a_image_that_does_not_fit_is_an_error(processor: Any, side: str) -> None:
    arguments: dict[str, Any] = {"question": "Which?", "target": "5", "images": [image(1)]}
    # One token more than the image: the tokenizer's own begin or end.
    fits = example(processor, "big", **arguments, max_length=QUERIES + 1, side=side)
    assert len(text_and_answer(fits)[0]) == QUERIES + 1
    with pytest.raises(DataError, match=f"sample big: .* {QUERIES + 1} tokens, .* is {QUERIES}"):
        example(processor, "big", **arguments, max_length=QUERIES, side=side)


def test_a_image_token_in_the_text_is_an_error_naming_the_sample(processor: Any) -> None:
    for question, target in (("What does <image> mean?", "5"), ("Which?", "<image>")):
        with pytest.raises(DataError, match="sample odd.*<image>"):
            example(processor, "odd", question, target, [image(1)])


def with_sentinels(folder: Path, target: Path) -> Any:
    """The processor of a folder whose tokenizer has tokens for gaps, as the published T5's has."""
    from transformers import AutoTokenizer

    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["<extra_id_0>", "<extra_id_1>"], special_tokens=True)
    tokenizer.add_tokens(["digitally"])
    tokenizer.save_pretrained(target)
    return load(target).processor


@pytest.mark.parametrize(
    ("preset", "tokens"),
    [("tiny", ("</s>", "<pad>", "<extra_id_1>")), ("tiny-vicuna", ("<s>", "</s>"))],
)
def test_control_tokens_of_the_language_model_are_errors(
    folders: Path, tmp_path: Path, preset: str, tokens: Sequence[str]
) -> None:
    processor = with_sentinels(folders / preset, tmp_path / "sentinels")
    for token in tokens:
        odd = f"5 is{token}odd"
        cases: list[dict[str, Any]] = [
            {"question": odd, "target": "5"},
            {"question": "Which?", "target": odd},
            {"question": "Which?", "target": "5", "earlier": [("Why?", odd)]},
        ]
        for case in cases:
            with pytest.raises(DataError, match=f"sample odd.*{token}"):
                example(processor, "odd", **case)
        # The Q-Former's tokenizer reads it as a word like any other.
        example(processor, "even", "Which?", "5", [image(1)], instruction=odd)
    example(processor, "even", "Which digitally?", "digitally [SEP]")


@pytest.mark.parametrize("token", ["[SEP]", "[CLS]", "[PAD]", "[DEC]"])
def test_control_tokens_of_the_qformer_are_errors_where_it_reads(
    processor: Any, token: str
) -> None:
    odd = f"Which {token} digit?"
    with pytest.raises(DataError, match="sample odd.*" + re.escape(token)):
        example(processor, "odd", "Which?", "5", [image(1)], instruction=odd)
    with pytest.raises(DataError, match="sample odd.*" + re.escape(token)):
        example(processor, "odd", odd, "5", [image(1)])
    example(processor, "own", odd, "5", [image(1)], instruction="Which digit?")
    example(processor, "text", odd, "5")


def test_empty_answers_still_learn_to_stop(processor: Any) -> None:
    one = example(processor, "empty", "Say nothing.", "")
    assert text_and_answer(one)[1] == [processor.tokenizer.eos_token_id]


def test_published_limits() -> None:
    assert FAMILY.default_max_length == 32 + 128
