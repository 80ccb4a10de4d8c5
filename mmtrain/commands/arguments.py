"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got '{text}'; give a whole number of at least 1")
    return number


def share(text: str) -> float:
    """A share of one, which may be given in percent, for argparse."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"got '{text}'; give a share such as 5% or 0.05")
    return number


def folder_here(text: str) -> Path:
    """A folder to write shards to, for argparse: a URL would become a path with its name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            "give a folder on this machine; `mmtrain shards push DIR URL` sends it from there"
        )
    return Path(text)
