"""Dictionary forms: whoever was right stays right, and inflected words meet their bases."""

from __future__ import annotations

from random import Random

import pytest

from mmtrain import plugins
from mmtrain.tasks.interface import Sample
from mmtrain.tasks.lemmas import lemma_form
from mmtrain.tasks.vqa_score import plain_form, vqa_score


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Surfing!", "surf"),
        ("the men", "man"),
        ("Playing frisbee", "play frisbee"),
        ("two geese", "2 goose"),
        ("fishing rods", "fish rod"),
        ("baked potatoes", "bake potato"),
        ("skis", "ski"),
        ("bus", "bus"),
        ("grass", "grass"),
        ("Qrxvbl crème brûlée", "qrxvbl crème brûlée"),
        ("won't", "won't"),
        ("", ""),
    ],
)
def test_words_in_their_dictionary_form(text: str, form: str) -> None:
    assert lemma_form(text) == form


def test_no_answer_loses_by_it() -> None:
    """Equal words have equal forms, so lemmatising both sides only ever adds agreement."""
    words = "surf surfing man men dog dogs 2 two left leaves leaf baked run ran better Bus".split()
    random, gained = Random(0), 0
    for _ in range(500):
        answers = [" ".join(random.choices(words, k=random.randint(1, 2))) for _ in range(10)]
        said = random.choice([*answers, *words])
        before, after = (vqa_score(said, answers, form) for form in (plain_form, lemma_form))
        assert after >= before
        gained += after > before
    assert gained > 50


def test_okvqa_and_textvqa_tell_both() -> None:
    sample = Sample("1", question="What is he doing?", answers=("surf",) * 10)
    okvqa, textvqa = plugins.load("task", "okvqa"), plugins.load("task", "textvqa")
    metrics, scores = okvqa.score([sample], ["Surfing."], okvqa.templates["zhou2024"])
    assert metrics == {"vqa_score": 0, "vqa_score_lemmas": 1} and scores == [0]
    metrics, _ = textvqa.score([sample], ["surfs"], textvqa.templates["wang2024"])
    assert (metrics["first_answer"], metrics["first_answer_lemmas"]) == (0, 1)
