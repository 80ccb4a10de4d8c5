"""One rendered sample -> token ids: images first, then the prompt, then the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtrain.errors import DataError
from mmtrain.models.dropout import stable_hash
from mmtrain.models.interface import Example, Size
from mmtrain.models.pixels import pixel_values, rgb
from mmtrain.models.text import IGNORED, refuse_control_tokens
from mmtrain.tasks.interface import Rendered, Turn

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
_EARLIER = {"user": "Question", "assistant": "Answer"}


def prompt_text(turns: Sequence[Turn]) -> str:
    """The last question; earlier turns, which the published models never saw, stand before it."""
    earlier = [f"{_EARLIER[turn.role]}: {turn.text}" for turn in turns[:-1]]
    return " ".join([*earlier, turns[-1].text])


def encode_text(
    processor: Any,
    sample_id: str,
    rendered: Rendered,
    sizes: Sequence[Size],
    max_length: int,
    truncation_side: str,
) -> Example:
    """Tokenise one sample. `max_length` bounds images and prompt; answers are never cut."""
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    _refuse_control_tokens(processor, sample_id, rendered, bool(sizes))
    prompt = prompt_text(rendered.turns)
    num_image_tokens = processor.num_query_tokens * len(sizes)
    room = max_length - num_image_tokens
    text = _within(tokenizer, prompt, room, truncation_side)
    if text is None:
        fixed = num_image_tokens + len(_frame(tokenizer))
        raise DataError(
            f"sample {sample_id}: its image alone takes {fixed} tokens,"
            f" data.max_length is {max_length}.",
            "Raise data.max_length or leave the sample out.",
        )
    # The end is taught in training and found in generation, so every answer has one.
    answer = tokenizer(rendered.target, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    input_ids, labels = [image_id] * num_image_tokens + text, answer
    if processor.decoder_start_token_id is None:
        labels = [IGNORED] * len(input_ids) + answer
        input_ids = input_ids + answer
    room = min(max_length - processor.num_query_tokens, processor.instruction_positions)
    instruction = rendered.instruction if rendered.instruction is not None else prompt
    instruction_ids = _within(processor.qformer_tokenizer, instruction, room, truncation_side)
    return Example(
        sample_id,
        stable_hash(sample_id),
        input_ids,
        labels,
        # Without any room the Q-Former reads the bare frame of a text.
        extras={"instruction_ids": instruction_ids or _frame(processor.qformer_tokenizer)},
    )


def pixels(processor: Any, images: Sequence[Image]) -> list[torch.Tensor]:
    """The images as the tower reads them."""
    return [pixel_values(processor.image_processor, rgb(image)) for image in images]


def _refuse_control_tokens(
    processor: Any, sample_id: str, rendered: Rendered, has_images: bool
) -> None:
    """In what the language model reads, and in what the Q-Former reads of images."""
    said = [turn.text for turn in rendered.turns]
    refuse_control_tokens(processor.control_tokens, sample_id, [*said, rendered.target])
    if has_images:
        told = said if rendered.instruction is None else [rendered.instruction]
        refuse_control_tokens(processor.qformer_control_tokens, sample_id, told)


def _within(
    tokenizer: PreTrainedTokenizerBase, text: str, room: int, side: str
) -> list[int] | None:
    """The text's tokens, cut on one side to `room`; the tokenizer's own frame around it stays."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, is_frame = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    surplus = len(ids) - room
    if surplus <= 0:
        return ids
    cuttable = [position for position, framing in enumerate(is_frame) if not framing]
    if surplus > len(cuttable):
        return None
    cut = set(cuttable[:surplus] if side == "left" else cuttable[-surplus:])
    return [token for position, token in enumerate(ids) if position not in cut]


def _frame(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer("")["input_ids"])
