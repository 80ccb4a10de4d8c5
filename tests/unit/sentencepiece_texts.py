"""Texts in which runs of spaces, code, tables, scripts and unknown characters meet."""

from __future__ import annotations

import random

_WORDS = (
    "two spaces Which digit is in the picture? def return self None USER: ASSISTANT: # Heading"
    " - item `code` | a | b | 12 345 {'a': 1} __init__ <0x0A> <0x41> <s > \\n http://a.b/c_d"
    " \u00e9 \u00df e\u0301 \u4e16\u754c \u05e9\u05dc\u05d5\u05dd \U0001f642"
    " \u2581 \u2581\u2581 \ufb01 \u0663"
).split(" ")
_BETWEEN = (" ", " ", "  ", "   ", "\n", "\n\n", "\n    ", "\t", " \t ", "", "\u00a0", "\u3000")
WRITTEN = (
    "two  spaces",
    "for i in range(3):\n    if i:\n        print(i)\n\n\n# done",
    "| a    | b  |\n|------|----|\n| 1    | 22 |",
    "1. one\n   - under it\n     - and   under that",
    "trailing   ",
    "<0x0A>0x41>",
)


def texts(count: int) -> list[str]:
    """None begins with a space."""
    chance = random.Random(5)
    made = list(WRITTEN)
    while len(made) < count:
        text = chance.choice(_WORDS[:8])
        for _ in range(chance.randint(0, 14)):
            gap = chance.choice((*_BETWEEN, " " * chance.randint(1, 40)))
            text += gap + chance.choice(_WORDS)
        made.append(text + chance.choice(("", "", "\n", " " * 9)))
    return made
