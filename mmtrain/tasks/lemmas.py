"""Answers by the words' dictionary forms: surfing is surf, men are man.

The published scorer lemmatises what a model says, since OKVQA's answers are reduced already. Here
both sides take the same form, so that whoever is right stays right. The word list is lemminflect's:
verbs before nouns, and a word that it does not know stays as it is.
"""

from __future__ import annotations

from functools import lru_cache

from mmtrain.tasks.vqa_score import plain_form

_KNOWN_WORDS = 1 << 16


def lemma_form(text: str) -> str:
    """The plain form of an answer, each of its words in its dictionary form."""
    return " ".join(map(_lemma, plain_form(text).split()))


@lru_cache(_KNOWN_WORDS)
def _lemma(word: str) -> str:
    from lemminflect import getAllLemmas  # reads its word list when it is first asked

    known = getAllLemmas(word)
    verbs, nouns = (known.get(kind, ()) for kind in ("VERB", "NOUN"))
    found: str = next((lemma for lemma in (*verbs, *nouns) if lemma != word), word)
    return found
