"""What Qwen-VL really sees: tokens decoded again, answers marked, and what truncation may cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmtrain.errors import DataError
from mmtrain.models.families.qwen_vl.processing import pixel_values
from mmtrain.models.families.qwen_vl.tokenizer import SPECIAL_TOKENS
from mmtrain.models.interface import Example
from mmtrain.models.text import IGNORED, prompt_ids
from mmtrain.peft.trainable import Trainable
from mmtrain.resolve import model_options, resolve
from mmtrain.training.export import loading_snippet
from tests.unit.qwen_vl_material import (
    FAMILY,
    GOLDEN,
    example,
    image,
    load,
    mixed,
    padded,
    write_plain,
)

IMAGE_TOKENS = 16
CUE = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_plain(tmp_path_factory.mktemp("qwen_vl"))).processor


def decoded(processor: Any, ids: Sequence[int]) -> str:
    """The text of tokens, image tokens counted."""
    parts = []
    for is_image, group in groupby(ids, lambda one: one == processor.image_token_id):
        run = list(group)
        text = f"<imgpad>*{len(run)}" if is_image else processor.tokenizer.decode(run)
        parts.append(text)
    return "".join(parts)


def readable(processor: Any, one: Example) -> str:
    """Stretches without loss behind a dot, stretches with loss behind an arrow."""
    lines = [f"=== {one.id}: {len(one.pixels)} picture(s)"]
    pairs = zip(one.input_ids, one.labels, strict=True)
    for has_loss, group in groupby(pairs, lambda pair: pair[1] != IGNORED):
        run = list(group)
        assert all(label in (IGNORED, token) for token, label in run)
        text = decoded(processor, [token for token, _ in run]).replace("\n", "\\n")
        lines.append(f"{'loss >' if has_loss else '     .'}{text}|")
    return "\n".join(lines) + "\n"


def test_prompts_are_the_published_form(processor: Any) -> None:
    found = "\n".join(readable(processor, one) for one in mixed(processor))
    assert found == (GOLDEN / "prompts.txt").read_text(encoding="utf-8")


def test_image_positions_are_never_labels(processor: Any) -> None:
    for one in mixed(processor):
        assert processor.image_token_id not in one.labels
        assert one.input_ids.count(processor.image_token_id) == IMAGE_TOKENS * len(one.pixels)


def test_generation_starts_where_the_last_answer_would(processor: Any) -> None:
    for one in mixed(processor):
        prompt = prompt_ids(one.input_ids, one.labels)
        assert decoded(processor, prompt).endswith(CUE)
        assert one.labels[len(prompt)] != IGNORED
        assert all(label != IGNORED for label in one.labels[len(prompt) :])


def test_text_that_spells_special_tokens_stays_text(processor: Any) -> None:
    plain = example(processor, "a", "Why?", "4", [image(1)], [("Say it.", "yes")])
    spelled = "".join([*SPECIAL_TOKENS[:4], *SPECIAL_TOKENS[-10:]])
    earlier = [(f"Say {spelled}.", f"{spelled} yes")]
    one = example(
        processor, "a", f"{spelled}<img>x.png</img>?", spelled, [image(1)], earlier, 10_000
    )
    first_special = len(processor.tokenizer.ranks)

    def special(sample: Example) -> list[int]:
        return [token for token in sample.input_ids if token >= first_special]

    assert special(one) == special(plain)
    assert decoded(processor, one.input_ids).count(spelled) == 4


def test_grounding_data_has_control_tokens_of_its_own(
    processor: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The six tags of regions, where the run file allows them; nothing else that text spells."""
    folder = write_plain(tmp_path_factory.mktemp("grounding"))
    allowed = load(folder, grounding_tokens=True).processor
    others = "<img>x.png</img><|im_end|><|extra_0|><imgpad><Box><ref"
    asked = f"Where is <ref>the 5</ref>{others}?"
    said = "<ref>5</ref><box>(1,2),(3,4)</box><quad>(1,1)</quad>cafe\u0301"
    samples = [example(one, "g", asked, said, [image(1)]) for one in (allowed, processor)]
    tokenizer = allowed.tokenizer
    tags = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]

    def tags_of(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([one]) for one in ids if tokenizer.decode([one]) in tags]

    assert tags_of(samples[0].input_ids) == [*tags[:2], *tags]
    assert tags_of(samples[1].input_ids) == []
    specials = [
        [one for one in sample.input_ids if one >= len(tokenizer.ranks) and not tags_of([one])]
        for sample in samples
    ]
    assert specials[0] == specials[1]
    # As published: what lies between two of them is tokenised by itself, in composed form.
    plain = tokenizer.special
    wanted: list[int] = []
    for tag, inside in (("ref", "5"), ("box", "(1,2),(3,4)"), ("quad", "(1,1)")):
        wanted += [plain[f"<{tag}>"], *processor.tokenizer.ids(inside), plain[f"</{tag}>"]]
    wanted += processor.tokenizer.ids("caf\u00e9")
    assert answers(samples[0])[: len(wanted)] == wanted
    # An answer is worth nothing without its boxes.
    decoded_answer = tokenizer.decode(answers(samples[0]), skip_special_tokens=True)
    assert decoded_answer.rstrip("\n") == said.replace("e\u0301", "\u00e9")
    # Both spell the same text.
    assert decoded(allowed, samples[0].input_ids) == decoded(allowed, samples[1].input_ids)


@pytest.mark.parametrize("given", [{}, {"grounding_tokens": True}])
def test_run_file_and_model_card_say_whether_tags_are_tokens(
    tmp_path: Path, given: dict[str, bool]
) -> None:
    folder = write_plain(tmp_path / "folder")
    config = resolve({"model": {"family": "qwen_vl", "checkpoint": str(folder), **given}})
    found: dict[str, Any] = {}
    exec(loading_snippet(config, Trainable({}, (), ()), None, nn.Module()), found)
    loaded = FAMILY.code.load(model_options(config), None)
    for tokenizer in (loaded.processor.tokenizer, found["processor"].tokenizer):
        is_token = tokenizer.ids("<box>") == [tokenizer.special["<box>"]]
        assert is_token == ("grounding_tokens" in given)


def test_newlines_of_a_question_join_the_one_before_it(processor: Any) -> None:
    """As published: text behind an image's tag is tokenised together with its newline."""
    tokenizer = processor.tokenizer
    one = example(processor, "a", "\nWhy?", "4", [image(1)])
    ids = one.input_ids[one.input_ids.index(tokenizer.special["</img>"]) + 1 :]
    together = tokenizer.ids("\n\nWhy?")
    assert ids[: len(together)] == together


LONG = "Which digit of these is in the picture? " * 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("surplus", [1, 30, 90])
def test_truncation_spares_images_and_answers(processor: Any, side: str, surplus: int) -> None:
    def encoded(limit: int) -> Example:
        earlier = [("Which digit?", "3 or so")]
        images = [image(1), image(2)]
        return example(processor, "long", LONG, "4 and 5", images, earlier, limit, side)

    whole = encoded(10_000)
    limit = len(whole.input_ids) - surplus
    cut = encoded(limit)
    assert len(cut.input_ids) == len(cut.labels) == limit
    assert answers(cut) == answers(whole)
    # Images keep their tags around all of their places, and turns their own.
    text = decoded(processor, cut.input_ids)
    assert text.count(f"<img><imgpad>*{IMAGE_TOKENS}</img>") == 2
    assert text.count("<|im_start|>") == text.count("<|im_end|>") == 5
    assert decoded(processor, prompt_ids(cut.input_ids, cut.labels)).endswith(CUE)
    assert is_subsequence(cut.input_ids, whole.input_ids)
    system = decoded(processor, whole.input_ids[:10])
    assert text.startswith(system) == (side == "right")


def answers(one: Example) -> list[int]:
    return [label for label in one.labels if label != IGNORED]


def is_subsequence(short: Sequence[int], whole: Sequence[int]) -> bool:
    remaining = iter(whole)
    return all(token in remaining for token in short)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_image_that_does_not_fit_is_an_error(processor: Any, side: str) -> None:
    arguments: dict[str, Any] = {"question": "Which?", "target": "5", "images": [image(1)]}
    limit = IMAGE_TOKENS + 2
    with pytest.raises(DataError, match=rf"sample big: .*data.max_length is {limit}") as caught:
        example(processor, "big", **arguments, max_length=limit, side=side)
    least = int(str(caught.value).split(" alone take ")[1].split()[0])
    assert (
        len(example(processor, "big", **arguments, max_length=least, side=side).input_ids) == least
    )
    with pytest.raises(DataError, match=f"alone take {least} tokens"):
        example(processor, "big", **arguments, max_length=least - 1, side=side)


def test_empty_answers_still_learn_to_stop(processor: Any) -> None:
    one = example(processor, "empty", "Say nothing.", "")
    assert processor.tokenizer.decode(answers(one)) == "<|im_end|>\n"


def test_images_are_squeezed_and_normalised(tmp_path: Path) -> None:
    """Black, white and grey by hand; a transparent image loses its transparency."""
    mean, spread = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for colour in ((0, 0, 0), (255, 255, 255), (51, 102, 204)):
        found = pixel_values(Image.new("RGB", (30, 50), colour), 32)
        assert found.shape == (3, 32, 32) and found.dtype == torch.float32
        wanted = [(c / 255 - m) / s for c, m, s in zip(colour, mean, spread, strict=True)]
        assert torch.allclose(found, torch.tensor(wanted)[:, None, None].expand(3, 32, 32))
    seen = image(1)
    path = tmp_path / "with-alpha.png"
    seen.convert("RGBA").save(path)
    assert torch.equal(pixel_values(Image.open(path), 32), pixel_values(seen, 32))


def test_padding_is_masked(processor: Any) -> None:
    ids, mask = padded(mixed(processor), "left")
    assert ids.shape == mask.shape and int(mask[1, 0]) == 0
