"""The papers' ways to ask a question about a picture for a short answer."""

from __future__ import annotations

import re

from mmtrain.tasks.interface import Rendered, Sample, Turn

SHORT_ANSWER = "Answer the question using a single word or phrase."
SIGNS = re.compile(r'[.!"()*#:;~]')
_MOST_WORDS = 50


def zhou2024(sample: Sample) -> Rendered:
    """The question and a request to be short; the most frequent answer (Zhou et al. 2024)."""
    return Rendered((Turn("user", f"{sample.question} {SHORT_ANSWER}"),), sample.answers[0])


def wang2024(sample: Sample) -> Rendered:
    """As Wang et al. 2024 train: lower case, without ten signs, the first answer that was listed.

    Their evaluation asks OKVQA with the same words, but capitals and colons, and A-OKVQA with the
    question alone, which is `plain`.
    """
    asked = SIGNS.sub("", f"Question: {sample.question} Short answer:".lower()).rstrip(" ")
    prompt = " ".join(asked.split(" ")[:_MOST_WORDS])
    return Rendered((Turn("user", prompt),), first_answer(sample), instruction=prompt)


def first_answer(sample: Sample) -> str:
    """The answer that was listed first."""
    listed = sample.meta.get("first_answer")
    return listed if isinstance(listed, str) else sample.answers[0]
