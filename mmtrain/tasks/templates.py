"""Ways to ask that any data set can use, and those that a run file brings.

A run file's own template is plain text with names in braces: `question`, `answer`, `choices`,
`lettered_choices`, `letter`, and whatever else a sample knows of itself. It is filled in by name
alone: nothing of it is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from mmtrain.errors import ConfigError, nearest
from mmtrain.tasks.interface import Rendered, Sample, Template, Turn

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


def plain(sample: Sample) -> Rendered:
    """The question alone; or a conversation, of which the last answer is the target."""
    if sample.turns:
        return Rendered(sample.turns[:-1], sample.turns[-1].text)
    return Rendered((Turn("user", sample.question),), sample.answers[0], candidates=sample.choices)


def letters(sample: Sample) -> Rendered:
    """The question with lettered choices, answered by the letter; as `plain` without choices, or
    with more than there are letters."""
    if not 0 < len(sample.choices) <= len(LETTERS):
        return plain(sample)
    known = _known(sample)
    prompt = "\n".join(filter(None, (sample.question, known["lettered_choices"])))
    candidates = tuple(LETTERS[: len(sample.choices)])
    return Rendered((Turn("user", prompt),), known["letter"], candidates=candidates)


def bracketed(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices as the InstructBLIP PEFT papers letter them, in prompts and in answers."""
    small = LETTERS.lower()[: len(choices)]
    return tuple(f"({letter}) {choice}" for letter, choice in zip(small, choices, strict=True))


def without_signs(prompt: str) -> str:
    """Those papers' text processor drops four signs from prompts, not from answers."""
    return re.sub(r"[!*#;]", "", prompt)


def own(
    prompt: str,
    target: str,
    mode: Literal["generate", "rank"],
    optional: Collection[str] = frozenset(),
) -> Template:
    """The template of a run file; `optional` names may be missing in some samples."""
    absent = dict.fromkeys(optional, "")

    def own_template(sample: Sample) -> Rendered:
        if sample.turns:
            raise ValueError("a conversation asks in its own words")
        known = absent | _known(sample)
        candidates = tuple(
            filled(target, known | _choice(sample, number)) for number in range(len(sample.choices))
        )
        asked = (Turn("user", filled(prompt, known)),)
        return Rendered(asked, filled(target, known), candidates=candidates)

    return Template(own_template, mode)


def placeholders(text: str) -> list[str]:
    """The names in braces; a brace that belongs to none is an error with the remedy."""
    names = []
    for place in _PLACE.finditer(text):
        if place[0] in "{}":
            raise ValueError(
                f"a single '{place[0]}' at character {place.start() + 1}; write a name in braces,"
                " as in {question}, or '{{' and '}}' for braces"
            )
        if place[1]:
            names.append(place[1])
    return names


def own_for(
    prompt: str, target: str, mode: Literal["generate", "rank"], first: Sequence[Sample]
) -> Template:
    """A run file's template for data that begin so; names that they do not have are an error."""
    known: set[str] = set()
    for sample in first:
        try:
            known |= _known(sample).keys()
        except ValueError:
            continue  # it fits no template, and is told when it is asked
    texts = {"prompt": prompt, "target": target}
    problems = [
        f"data.template.{key}: the data have no '{name}'; {nearest(name, known)}"
        for key, text in texts.items()
        for name in placeholders(text)
        if name not in known
    ]
    if mode == "rank" and not any(sample.choices for sample in first):
        problems.append("data.template.mode: the data have no choices to rank; use generate")
    if problems:
        raise ConfigError(problems)
    return own(prompt, target, mode, {name for sample in first for name in sample.meta})


def _known(sample: Sample) -> dict[str, str]:
    known = {name: _shown(value) for name, value in sample.meta.items()}
    if sample.question:
        known["question"] = sample.question
    if sample.answers:
        known["answer"] = sample.answers[0]
    if sample.choices:
        known["choices"] = ", ".join(sample.choices)
        if len(sample.choices) <= len(LETTERS):
            pairs = zip(LETTERS, sample.choices, strict=False)
            known["lettered_choices"] = "\n".join(f"{letter}. {text}" for letter, text in pairs)
        known |= _choice(sample, answer_index(sample))
    return known


def _choice(sample: Sample, number: int) -> dict[str, str]:
    answer = {"answer": sample.choices[number]}
    has_letters = len(sample.choices) <= len(LETTERS)
    return answer | ({"letter": LETTERS[number]} if has_letters else {})


def answer_index(sample: Sample) -> int:
    """The number of the right choice; `meta` says it where two choices read the same."""
    index = sample.meta.get("answer_index")
    if index is None:
        return sample.choices.index(sample.answers[0])
    if type(index) is not int or not 0 <= index < len(sample.choices):
        raise ValueError(f"answer_index {index!r} among {len(sample.choices)} choices")
    if sample.choices[index] != sample.answers[0]:
        raise ValueError(f"choice {index} is not the answer")
    return index


def _shown(value: object) -> str:
    return value if isinstance(value, str) else str(value)


def filled(text: str, known: Mapping[str, str]) -> str:
    """The text with what is known in the places of its names."""

    def value(place: re.Match[str]) -> str:
        return known[place[1]] if place[1] else place[0][0]

    return _PLACE.sub(value, text)
