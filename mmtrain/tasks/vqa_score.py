"""The VQA score and its relatives: answers compared with those of ten people.

A text is compared in a plain form: without punctuation and articles, in lower case, with numbers as
digits and contractions with their apostrophes. Both sides take it. The published scripts leave the
people's answers as they are in some cases, and then no prediction can equal an answer with an
article or a capital; on answers that are plain already, as the sets hold them, the scores agree.
Another form can take its place: `mmtrain.tasks.lemmas` compares by dictionary forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmtrain.tasks.interface import Metric, Sample, Template

VQA_SCORE = Metric("vqa_score", larger_is_better=True, unit="%")
VQA_SCORE_LEMMAS = Metric("vqa_score_lemmas", larger_is_better=True, unit="%")
Form = Callable[[str], str]
_ENOUGH = 3  # people who agree

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_DIGITS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# Which words are known with an ending, in the published list.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were"
    " wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
}
_OTHERS = ("ma'am", "o'clock", "'twas", "'ow's'at", "y'all", "y'all'd've")


def _without_one_apostrophe() -> dict[str, str]:
    """Every known contraction by the spellings that lack one of its apostrophes."""
    known = [word + ending for ending, words in _ENDINGS.items() for word in words.split()]
    return {
        word[:place] + word[place + 1 :]: word
        for word in (*known, *_OTHERS)
        for place, sign in enumerate(word)
        if sign == "'"
    }


_CONTRACTIONS = _without_one_apostrophe()


def plain_form(text: str) -> str:
    """A text as it is compared."""
    words = _without_punctuation(" ".join(text.split())).lower().split()
    as_digits = (_DIGITS.get(word, word) for word in words)
    made = " ".join(_CONTRACTIONS.get(word, word) for word in as_digits if word not in _ARTICLES)
    # Nothing is left of an article alone, the answer to "which letter is it?".
    return made or text.strip().lower()


def _without_punctuation(text: str) -> str:
    """A sign goes where a space is beside it, or digits have commas; elsewhere it parts words."""
    grouped = _GROUPED_DIGITS.search(text) is not None
    made = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        made = made.replace(sign, "" if beside_space or grouped else " ")
    return _PERIOD.sub("", made)


def vqa_score(prediction: str, answers: Sequence[str], form: Form = plain_form) -> float:
    """The mean over all ways to leave one person out: a third for each other who says the same.

    A single answer leaves nobody to compare with; it is right or wrong.
    """
    said, given = form(prediction), [form(answer) for answer in answers]
    same, total = given.count(said), len(given)
    if total <= 1:
        return float(same)
    one_of_them_out, another_out = _share(same - 1), _share(same)
    return (same * one_of_them_out + (total - same) * another_out) / total


def direct_score(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's: a third for each person who says the same to the letter."""
    return _share(list(answers).count(prediction.strip()))


def _share(agreeing: int) -> float:
    return min(1.0, agreeing / _ENOUGH)


def equal_in_form(prediction: str, answer: str, form: Form = plain_form) -> float:
    """1.0 where both read the same."""
    return float(form(prediction) == form(answer))


def vqa_scores(
    samples: Sequence[Sample],
    predictions: Sequence[str],
    template: Template,
    form: Form = plain_form,
) -> list[float]:
    """The VQA score of each.

    Where a template words answers its own way, what it wanted is right, too.
    """
    scores = []
    for sample, prediction in zip(samples, predictions, strict=True):
        target = template(sample).target
        worded = 0.0 if target in sample.answers else equal_in_form(prediction, target, form)
        scores.append(max(worded, vqa_score(prediction, sample.answers, form)))
    return scores
