"""What rank 0 does for all: its result or its error reaches every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmtrain import distributed
from mmtrain.errors import MmtrainError, Terminated
from mmtrain.safe_text import presentable

_Result = TypeVar("_Result")


def on_main(action: Callable[[], _Result]) -> _Result:
    """Rank 0's result on every rank; its error, whatever it is, so that no rank is left waiting."""
    results: list[_Result] = []  # one, unless there is an error
    error: Exception | None = None
    text: str | None = None
    if distributed.is_main():
        try:
            results.append(action())
        except Exception as fault:
            error, text = fault, worded(fault)
    results, text = distributed.from_main((results, text))
    if error is not None:
        raise error
    if text is not None:
        raise MmtrainError(text)
    return results[0]


def worded(error: BaseException) -> str:
    """An error as one line that tells no secret; what is none of ours needs its type, too."""
    if isinstance(error, MmtrainError | Terminated) or not str(error):
        return presentable(str(error) or type(error).__name__)
    return presentable(f"{type(error).__name__}: {error}")
