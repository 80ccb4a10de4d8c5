"""From a conversation and its images to token ids and labels, and from those to a batch.

The form is the published ChatML: a system turn, then the turns, each between `<|im_start|>` and
`<|im_end|>` and followed by a newline. Images stand before their questions, numbered, as
`Picture 1: <img>…</img>` and a newline. Between the two tags lie as many `<imgpad>` as an image
has features; the published code writes the image's path there, which its features then cover
just the same. As published, every stretch of text between special tokens, and the role before its
newline, is tokenised by itself.

The loss falls on an answer's text, its `<|im_end|>` and the newline behind it, as in the published
fine-tuning code; that code also scores the special tokens and newlines of the other turns, which
are no answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mmtrain.models import batching, text
from mmtrain.models.dropout import stable_hash
from mmtrain.models.families.qwen_vl.configuration import QWenConfig, num_queries
from mmtrain.models.families.qwen_vl.processing import Processor, pixel_values
from mmtrain.models.families.qwen_vl.tokenizer import (
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    TURN_END,
    TURN_START,
    QwenTokenizer,
)
from mmtrain.models.interface import Batch, BatchSize, Example, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtrain.tasks.interface import Rendered

SYSTEM = "You are a helpful assistant."


def encode_text(
    processor: Processor,
    sample_id: str,
    rendered: Rendered,
    sizes: Sequence[Size],
    max_length: int,
    truncation_side: str,
) -> Example:
    """One conversation whose last turn is the answer."""
    ids: list[int] = []
    labels: list[int] = []
    for part, is_answer in _parts(processor, text.conversation(rendered, len(sizes))):
        ids += part
        labels += part if is_answer else [text.IGNORED] * len(part)
    tokenizer = processor.tokenizer
    cue = [*_end(tokenizer), *_opening(tokenizer, "assistant")]
    ids, labels = text.truncate(
        ids,
        labels,
        processor.image_token_id,
        max_length,
        truncation_side,
        sample_id,
        len(cue),
        also_kept=processor.kept_ids,
    )
    return Example(sample_id, stable_hash(sample_id), ids, labels)


def pixels(processor: Processor, images: Sequence[Image]) -> list[torch.Tensor]:
    """The images as the tower reads them."""
    return [pixel_values(image, processor.image_size) for image in images]


def _parts(processor: Processor, turns: text.Turns) -> Iterator[tuple[list[int], bool]]:
    """Stretches of token ids, each with whether the loss falls on it."""
    tokenizer, shown = processor.tokenizer, 0
    for role, said, num_images in (("system", SYSTEM, 0), *turns):
        yield _opening(tokenizer, role), False
        if num_images:
            yield _images(processor, range(shown + 1, shown + num_images + 1)), False
            shown += num_images
            said = f"\n{said}"
        yield tokenizer.ids(said) + _end(tokenizer), role == "assistant"


def _opening(tokenizer: QwenTokenizer, role: str) -> list[int]:
    return [tokenizer.special[TURN_START], *tokenizer.ids(role), *tokenizer.ids("\n")]


def _end(tokenizer: QwenTokenizer) -> list[int]:
    return [tokenizer.special[TURN_END], *tokenizer.ids("\n")]


def _images(processor: Processor, numbers: range) -> list[int]:
    """Images by number, without the newline behind the last: it belongs to the text behind it."""
    tokenizer = processor.tokenizer
    start, pad, end = (tokenizer.special[t] for t in (IMAGE_START, IMAGE_PAD, IMAGE_END))
    ids: list[int] = []
    for number in numbers:
        newline = "\n" if number > numbers.start else ""
        ids += tokenizer.ids(f"{newline}Picture {number}: ")
        ids += [start, *[pad] * processor.tokens_per_image, end]
    return ids


def collate(examples: Sequence[Example], processor: Any, generating: bool = False) -> Batch:
    """A batch without any image carries a blank one that nothing reads."""
    tensors = batching.text_tensors(examples, processor.image_token_id, generating)
    side = processor.image_size
    tensors |= batching.image_tensors(examples, side, side)
    if not generating:
        tensors |= batching.answer_targets(examples, tensors["input_ids"].shape[1])
    return batching.make_batch(examples, tensors)


def planned_batch(config: QWenConfig, size: BatchSize) -> Batch:
    """A batch of this size, to measure what it costs."""
    assert config.visual is not None
    side, image_id = config.visual["image_size"], config.visual["image_start_id"]
    image = [image_id] * num_queries(config)
    examples = batching.planned_examples(size, image, torch.zeros(3, side, side), {})
    return collate(examples, SimpleNamespace(image_token_id=image_id, image_size=side))
