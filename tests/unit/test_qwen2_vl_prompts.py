"""What Qwen2-VL, 2.5 and 3 really see: their own templates, answers marked, what may be cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.errors import DataError
from mmtrain.models.families.qwen2_vl.processing import (
    ANSWER_CUE,
    TURN_END,
    VISION_END,
    VISION_START,
    Processor,
)
from mmtrain.models.interface import Example
from mmtrain.models.text import IGNORED, prompt_ids
from tests.unit.qwen2_vl_material import (
    FAMILY,
    TINY,
    example,
    image,
    image_inputs,
    load,
    mixed,
    token_types,
    write_plain,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_vl" / "prompts.txt"
HEADER = """\
What the models are given; golden file of tests/unit/test_qwen2_vl_prompts.py.
Stretches without loss stand behind a dot, stretches with loss behind an arrow. The loss includes
the <|im_end|> that ends an answer, and not the newline behind it: generation stops at <|im_end|>,
so nobody ever asks the model for that newline.
"""
IMAGE_TOKENS = 16  # of 32 x 32 pixels: (32 / 4 / 2) squared


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    root = tmp_path_factory.mktemp("qwen2_vl")
    return {name: load(write_plain(root / name, name)).processor for name in TINY}


@pytest.fixture(params=TINY)
def processor(request: pytest.FixtureRequest, processors: dict[str, Processor]) -> Processor:
    return processors[request.param]


def decoded(processor: Processor, ids: Sequence[int]) -> str:
    """The text of tokens, image tokens counted."""
    parts = []
    for is_image, group in groupby(ids, lambda one: one == processor.image_token_id):
        run = list(group)
        text = f"<|image_pad|>*{len(run)}" if is_image else processor.tokenizer.decode(run)
        parts.append(text)
    return "".join(parts)


def readable(processor: Processor, one: Example) -> str:
    """One sample of the golden file."""
    lines = [f"=== {one.id}: {len(one.pixels)} picture(s), patches {one.extras['grid']}"]
    pairs = zip(one.input_ids, one.labels, strict=True)
    for has_loss, group in groupby(pairs, lambda pair: pair[1] != IGNORED):
        run = list(group)
        assert all(label in (IGNORED, token) for token, label in run)
        text = decoded(processor, [token for token, _ in run]).replace("\n", "\\n")
        lines.append(f"{'loss >' if has_loss else '     .'}{text}|")
    return "\n".join(lines) + "\n"


def test_prompts_are_the_published_form(processors: dict[str, Processor]) -> None:
    found = HEADER
    for name, processor in processors.items():
        found += f"\n##### {FAMILY.presets[name]['model_type']}\n\n"
        found += "\n".join(readable(processor, one) for one in mixed(processor))
    assert found == GOLDEN.read_text(encoding="utf-8")


# --- transformers' own processor on the same conversation -----------------------------------------


def own_processor(processor: Processor, preset: str) -> Any:
    """transformers' processor of the generation, without its video part (it needs torchvision)."""
    from mmtrain.models.families.qwen2_vl.shapes import transformers_class

    whole = transformers_class(FAMILY.presets[preset]["model_type"], "Processor")
    parts = ["image_processor", "tokenizer"]
    images_only = type("Images", (whole,), {"get_attributes": classmethod(lambda _: parts)})
    template = processor.tokenizer.chat_template
    return images_only(processor.image_processor, processor.tokenizer, chat_template=template)


def message(role: str, text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """A turn as chat templates take it."""
    content = [{"type": "image", "image": one} for one in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


@pytest.mark.parametrize("preset", TINY)
def test_tokens_and_patches_are_those_of_transformers_own_processor(
    processors: dict[str, Processor], preset: str
) -> None:
    processor = processors[preset]
    images = [image(1, (50, 24)), image(2)]
    one = example(processor, "a", "And  now?\nSay.", "a 2 ", images, [("Which?", "3, or 5")])
    conversation = [
        message("user", "Which?", images),
        message("assistant", "3, or 5"),
        message("user", "And  now?\nSay."),
    ]
    own = own_processor(processor, preset)
    asked = own.apply_chat_template(conversation, add_generation_prompt=True)
    told = own.apply_chat_template([*conversation, message("assistant", "a 2 ")])
    for text, ids in ((asked, prompt_ids(one.input_ids, one.labels)), (told, one.input_ids)):
        wanted = own(text=[text], images=images, return_tensors="pt")
        assert wanted["input_ids"][0].tolist() == ids
        assert torch.equal(wanted["mm_token_type_ids"], token_types(ids, processor))
    for name, tensor in image_inputs(one).items():
        assert torch.equal(wanted[name], tensor), name


def test_images_keep_their_own_size(processor: Processor) -> None:
    sizes = {
        (32, 32): (8, 8),
        (64, 32): (8, 16),
        (20, 24): (6, 4),
        (4, 4): (4, 4),
        (99, 9): (2, 24),
    }
    for size, (height, width) in sizes.items():
        one = example(processor, "a", "Which?", "5", [image(1, size)])
        assert one.extras["grid"] == [(1, height, width)], size
        assert one.pixels[0].shape == (height * width, 3 * 2 * 4 * 4)
        assert one.input_ids.count(processor.image_token_id) == height * width // 4


def test_large_images_shrink_to_the_budget(processor: Processor) -> None:
    one = example(processor, "a", "Which?", "5", [image(1, (300, 200))])
    ((_, height, width),) = one.extras["grid"]
    assert 0.7 < height * width * 16 / 64**2 <= 1
    assert width / height == pytest.approx(1.5, rel=0.25)


def test_several_images_stand_before_the_first_question(processor: Processor) -> None:
    images = [image(1), image(2, (64, 32))]
    one = example(processor, "two", "Same?", "no", images, [("Which?", "3")])
    text = decoded(processor, one.input_ids)
    first, second = (f"{VISION_START}<|image_pad|>*{n}{VISION_END}" for n in (16, 32))
    assert f"user\n{first}{second}Which?{ANSWER_CUE}3{TURN_END}" in text
    assert text.count(VISION_START) == 2


def test_generation_starts_where_the_last_answer_would(processor: Processor) -> None:
    for one in mixed(processor):
        prompt = prompt_ids(one.input_ids, one.labels)
        assert decoded(processor, prompt).endswith(ANSWER_CUE)
        last = one.labels[len(prompt) :]
        assert all(label != IGNORED for label in last[:-1])
        assert last[-1] == IGNORED, "the newline behind the last answer"


def answers(one: Example) -> list[int]:
    return [label for label in one.labels if label != IGNORED]


def test_empty_answers_still_learn_to_stop(processor: Processor) -> None:
    one = example(processor, "empty", "Say nothing.", "")
    assert answers(one) == [processor.tokenizer.eos_token_id]


# --- truncation -----------------------------------------------------------------------------------

LONG = "Which digit of these is in the picture? " * 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("surplus", [1, 30, 70])
def test_truncation_spares_images_answers_and_the_form(
    processor: Processor, side: str, surplus: int
) -> None:
    def encoded(limit: int) -> Example:
        earlier = [("Which digit?", "3 or so")]
        return example(processor, "long", LONG, "4 and 5", [image(1)], earlier, limit, side)

    whole = encoded(10_000)
    limit = len(whole.input_ids) - surplus
    cut = encoded(limit)
    assert len(cut.input_ids) == len(cut.labels) == limit
    assert cut.input_ids.count(processor.image_token_id) == IMAGE_TOKENS
    assert answers(cut) == answers(whole)
    assert decoded(processor, prompt_ids(cut.input_ids, cut.labels)).endswith(ANSWER_CUE)
    for token in processor.kept_ids:
        assert cut.input_ids.count(token) == whole.input_ids.count(token)
    remaining = iter(whole.input_ids)
    assert all(token in remaining for token in cut.input_ids), "no subsequence"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_image_that_does_not_fit_is_an_error(processor: Processor, side: str) -> None:
    arguments: dict[str, Any] = {"question": "Which?", "target": "5", "images": [image(1)]}
    with pytest.raises(DataError, match="sample big: .*data.max_length is 12") as caught:
        example(processor, "big", **arguments, max_length=12, side=side)
    minimum = int(str(caught.value).split("alone take ")[1].split()[0])
    assert minimum > IMAGE_TOKENS
    assert "model.max_pixels" in caught.value.remedy
    fits = example(processor, "big", **arguments, max_length=minimum, side=side)
    assert len(fits.input_ids) == minimum
    with pytest.raises(DataError, match=f"{minimum} tokens"):
        example(processor, "big", **arguments, max_length=minimum - 1, side=side)


def test_a_long_text_without_image_names_no_pixels(processor: Processor) -> None:
    with pytest.raises(DataError) as caught:
        example(processor, "big", "Which?", "5 and so on", max_length=8)
    assert "pixels" not in caught.value.remedy


# --- faults in samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_a_control_token_in_a_text_is_an_error_naming_the_sample(
    processor: Processor, token: str
) -> None:
    for question, target in ((f"What does {token} mean?", "5"), ("What?", f"It is {token}.")):
        with pytest.raises(DataError, match="sample odd") as caught:
            example(processor, "odd", question, target, [image(1)])
        assert token in str(caught.value) and caught.value.remedy


def test_a_strip_of_a_image_is_an_error_naming_the_sample(processor: Processor) -> None:
    with pytest.raises(DataError, match="sample strip: an image of 900 x 4 pixels"):
        example(processor, "strip", "Which?", "5", [image(1, (900, 4))])
