"""The VQA score: the plain form, cases counted by hand, and a plain recomputation of many."""

from __future__ import annotations

import random

import pytest

from mmtrain.tasks.interface import Sample, Template, Turn
from mmtrain.tasks.templates import own, plain
from mmtrain.tasks.vqa_files import first_listed, most_frequent
from mmtrain.tasks.vqa_score import (
    direct_score,
    equal_in_form,
    plain_form,
    vqa_score,
    vqa_scores,
)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Yes", "yes"),
        (" The  dog.\n", "dog"),
        ("an apple a day", "apple day"),
        ("Two dogs!", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        # A sign parts words, unless a space is beside it somewhere in the text.
        ("coca-cola", "coca cola"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("well-done, sir", "well done sir"),
        ("a -b-c", "bc"),
        # Digits with commas: every sign goes.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("$3.50", "$3.50"),
        (".5", ".5"),
        ("e. jackson", "e jackson"),
        ("U.S.A.", "usa"),
        ("11:38 et", "11:38 et"),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("it's", "it's"),
        ("its", "its"),
        ("well", "well"),
        ("oclock", "o'clock"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("Crème brûlée?", "crème brûlée"),
        ("日本", "日本"),
        ("", ""),
        ("?", "?"),
        ("the", "the"),
    ],
)
def test_plain_form(text: str, form: str) -> None:
    assert plain_form(text) == form


@pytest.mark.parametrize(
    ("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_scores_of_ten_answers(agreeing: int, score: float) -> None:
    answers = ["Net"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_score("a net.", answers) == pytest.approx(score)


def test_an_article_alone_is_an_answer_and_nothing_is_none() -> None:
    assert vqa_score("A", ["a"] * 10) == 1 and vqa_score("the", ["a"] * 10) == 0
    assert vqa_score("", ["a"] * 10) == 0 == vqa_score("!", ["a"] * 10)


def test_a_single_answer_is_right_or_wrong() -> None:
    assert vqa_score("Two", ["2"]) == 1.0
    assert vqa_score("three", ["2"]) == 0.0


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1), (9, 1)])
def test_direct_answers_are_compared_to_the_letter(agreeing: int, score: float) -> None:
    answers = ["ride"] * agreeing + ["bus"] * (10 - agreeing)
    assert direct_score(" ride\n", answers) == pytest.approx(score)
    assert direct_score("Ride", answers) == 0.0


def test_equal_in_plain_form() -> None:
    assert equal_in_form("Coca Cola", "coca-cola") == 1.0
    assert equal_in_form("cola", "coca-cola") == 0.0


def test_the_most_frequent_answer_and_the_first() -> None:
    assert most_frequent(["b", "a", "a", "b"]) == "b", "of equals, the one listed first"
    assert most_frequent(["", "", "a"]) == "a"
    assert first_listed([" ", "b", "a"]) == "b"


# --- a plain recomputation ------------------------------------------------------------------------


def _slow_form(text: str) -> str:
    """The published rules once more, sign by sign and word by word."""
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    places = range(len(flat) - 2)
    grouped = any(
        flat[at].isdigit() and flat[at + 1] == "," and flat[at + 2].isdigit() for at in places
    )
    signs = ""
    for sign in flat:
        if sign not in ';/[]"{}()=+\\_-><@`,?!':
            signs += sign
        elif not (sign + " " in flat or " " + sign in flat or grouped):
            signs += " "
    stops = [at for at, sign in enumerate(signs) if sign == "."]
    for at in reversed(stops):
        if not signs[at + 1 : at + 2].isdigit():
            signs = signs[:at] + signs[at + 1 :]
    known = {"two": "2", "none": "0", "ten": "10", "dont": "don't", "whats": "what's"}
    words = [known.get(word, word) for word in signs.lower().split()]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept) if kept else text.strip().lower()


def _slow_score(prediction: str, answers: list[str]) -> float:
    """The mean over every way to leave one answer out, each counted anew."""
    total = 0.0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        matching = [one for one in others if _slow_form(one) == _slow_form(prediction)]
        total += min(1.0, len(matching) / 3)
    return total / len(answers)


_WORDS = [
    "a",
    "The",
    "two",
    "2",
    "none",
    "dont",
    "don't",
    "Whats",
    "red",
    "Red",
    "café",
    "ten",
    "3,5",
]
_JOINTS = [" ", " ", ", ", "-", ",", ". ", ".", "/", "? ", "\n", " (", ") "]


def _made_up(draw: random.Random) -> str:
    text = draw.choice(_WORDS)
    for _ in range(draw.randrange(3)):
        text += draw.choice(_JOINTS) + draw.choice(_WORDS)
    return text + draw.choice(["", "", ".", "!", " "])


def test_four_hundred_made_up_answers_score_as_recomputed() -> None:
    draw = random.Random(2)
    seen = set()
    for _ in range(400):
        pool = [_made_up(draw) for _ in range(draw.randint(1, 6))]
        answers = [draw.choice(pool) for _ in range(10)]
        prediction = draw.choice([*pool, _made_up(draw)])
        wanted = _slow_score(prediction, answers)
        assert vqa_score(prediction, answers) == pytest.approx(wanted), (prediction, answers)
        assert plain_form(prediction) == _slow_form(prediction)
        seen.add(round(wanted, 6))
    assert seen == {0.0, 0.3, 0.6, 0.9, 1.0}


# --- templates ------------------------------------------------------------------------------------


def test_a_template_that_words_answers_its_own_way_is_scored_by_its_words() -> None:
    sample = Sample("1", question="Which?", answers=("red",) + ("crimson",) * 3 + ("blue",) * 6)
    said = ["Red.", "crimson", "The answer is red.", "green"]
    bare = own("{question}", "{answer}", "generate")
    for template in (Template(plain), bare):
        assert vqa_scores([sample] * 4, said, template) == pytest.approx([0.3, 0.9, 0.0, 0.0])
    worded = own("{question}", "The answer is {answer}", "generate")
    assert vqa_scores([sample] * 4, said, worded) == pytest.approx([0.3, 0.9, 1.0, 0.0])


def test_a_conversation_is_scored_by_its_last_turn() -> None:
    turns = (Turn("user", "Which?"), Turn("assistant", "The red one."))
    scores = vqa_scores([Sample("1", turns=turns)] * 2, ["red one", "red"], Template(plain))
    assert scores == [1.0, 0.0]
