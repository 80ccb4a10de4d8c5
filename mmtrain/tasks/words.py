"""Captions cut into words, as their scores count them.

`ptb_words` follows the Penn Treebank's rules as far as captions need them, so that scores compare
with published ones: those were counted on the words of Stanford's PTBTokenizer, which is Java.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = (
    "mr mrs ms dr st jr sr prof gen col sgt capt lt rev sen gov vs etc inc co corp ltd ave blvd rd"
    " mt ft al fig pp jan feb aug sept oct nov dec"
).split()
_TOKEN = re.compile(
    r"(?:https?://|www\.)[^\s\"]+"
    r"|[\w.+-]+@\w[\w-]*(?:\.[\w-]+)+"
    r"|[@#][^\W\d]\w*"
    r"|(?:[^\W\d_]\.){2,}"  # u.s. and a.m.
    rf"|\b(?:{'|'.join(_ABBREVIATIONS)})\."
    r"|\bno\.(?=\s*\d)"
    r"|\b[^\W\d_]\.(?=\s+\w)"  # an initial
    r"|'n'|o'clock|\bd'\w+|\by'(?=all\b)"
    r"|\d+(?:[.,:/]\d+)+(?!\w)"
    r"|\w+(?:(?:[-&/]|(?<!\d)')\w+)*"
    r"|\*+|[?!]+|[^\w\s]"
)
# What a word ends in that counts as a word of its own.
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))")
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# The published scores leave these out; brackets stay, since their names are no longer capitals.
_UNCOUNTED = frozenset("'\"`.?!,:;-\u2013\u2014\u2018\u2019\u201c\u201d\u2026")


def ptb_words(text: str) -> list[str]:
    """Lower-cased words, clitics apart, without punctuation."""
    cleaned = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    return [
        word
        for token in _TOKEN.findall(cleaned)
        if token not in _UNCOUNTED
        for word in _parts(token)
    ]


def _parts(token: str) -> tuple[str, ...]:
    if token in _SPLIT:
        return _SPLIT[token]
    if token in _BRACKETS:
        return (_BRACKETS[token],)
    clitic = _CLITIC.fullmatch(token)
    return (*_parts(clitic[1]), clitic[2]) if clitic else (token,)


def spaced_words(text: str) -> list[str]:
    """What white space separates, as it is written."""
    return text.split()
