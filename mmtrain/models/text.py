"""Turning conversations into token ids and labels, for decoder-only families.

The text is tokenised once, as a whole, and labels are found by character offsets: prompt and
answer can never be tokenised differently in training and generation.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mmtrain.tasks.interface import Rendered

IGNORED = -100
# A conversation: of every turn its role, its text, and how many images stand before that.
Turns = Sequence[tuple[str, str, int]]


@dataclass(frozen=True)
class Piece:
    """A stretch of text; the loss falls on its tokens when `is_answer`."""

    text: str
    is_answer: bool = False


def conversation(rendered: Rendered, num_images: int) -> Turns:
    """The turns of a rendered sample, with its answer as the last, and all its images."""
    elsewhere = sum(turn.images for turn in rendered.turns[1:])
    turns = [
        (turn.role, turn.text, turn.images if number else num_images - elsewhere)
        for number, turn in enumerate(rendered.turns)
    ]
    return [*turns, ("assistant", rendered.target, 0)]


def tokenise(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]
) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 outside answers) of the pieces, begin-of-text token included."""
    text, spans = "", []
    for piece in pieces:
        if piece.is_answer and piece.text:
            spans.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
    ids = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    for position, (start, end) in enumerate(encoded["offset_mapping"]):
        # A token belongs to an answer when it ends inside it: the space before the answer's
        # first word may be part of that token or not, depending on the tokenizer.
        if end > start and any(first < end <= last for first, last in spans):
            labels[position] = ids[position]
    return ids, labels


def refuse_control_tokens(
    control_tokens: Sequence[str], sample_id: str, texts: Iterable[str]
) -> None:
    """Their spelling in a text would end a turn, or ask for an image that is not there."""
    for said in texts:
        for token in control_tokens:
            if token in said:
                raise DataError(
                    f"sample {sample_id}: its text holds {token}, which the model reads as a"
                    " control token.",
                    "Take the token out of the text.",
                )


def expand(
    ids: Sequence[int], labels: Sequence[int], token_id: int, times: int
) -> tuple[list[int], list[int]]:
    """Repeat every image token as often as an image has features."""
    out_ids: list[int] = []
    out_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        count = times if token == token_id else 1
        out_ids.extend([token] * count)
        out_labels.extend([IGNORED if token == token_id else label] * count)
    return out_ids, out_labels


def truncate(
    ids: list[int],
    labels: list[int],
    kept_token_id: int,
    max_length: int,
    side: str,
    sample_id: str,
    cue_tokens: int = 0,
    also_kept: Container[int] = frozenset(),
    remedy: str = "Raise data.max_length or leave the sample out.",
) -> tuple[list[int], list[int]]:
    """Cut prompt text to `max_length` tokens; image tokens, answers and the first token stay.

    So do the `cue_tokens` before each answer, which tell the model whose turn it is, and the
    tokens `also_kept`, which carry the form of a conversation.
    """
    surplus = len(ids) - max_length
    if surplus <= 0:
        return ids, labels
    cuttable = [
        position
        for position in range(1, len(ids))
        if ids[position] != kept_token_id
        and ids[position] not in also_kept
        and all(label == IGNORED for label in labels[position : position + cue_tokens + 1])
    ]
    if surplus > len(cuttable):
        fixed = len(ids) - len(cuttable)
        raise DataError(
            f"sample {sample_id}: its image and answer alone take {fixed} tokens,"
            f" data.max_length is {max_length}.",
            remedy,
        )
    cut = set(cuttable[:surplus] if side == "left" else cuttable[-surplus:])
    kept = [position for position in range(len(ids)) if position not in cut]
    return [ids[position] for position in kept], [labels[position] for position in kept]


def prompt_ids(input_ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The tokens before the last answer begins: what generation starts from."""
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return list(input_ids[: start if end else len(input_ids)])
