"""InstructBLIP folders with lively weights, and samples for them: material of its tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from mmtrain import plugins
from mmtrain.models import decoding, encoding
from mmtrain.models.interface import Batch, Example, LoadedModel, ModelOptions
from mmtrain.tasks.interface import Rendered, Turn
from tests import tiny

FAMILY = plugins.load("family", "instructblip")
TINY_MODELS = ("tiny", "tiny-vicuna")
GREEDY = SimpleNamespace(
    max_new_tokens=6,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    repetition_penalty=1.0,
    batch_size=8,
)
TEXTS = (*tiny.DIGITS_TEXTS, "Say 7 and then 8. And now? Why? Question: Answer: What does it mean?")
ROLES = ("user", "assistant")


def write_lively(folder: Path, preset: str) -> Path:
    """Weights that matter everywhere: large, with biases and norms that are not 0 and 1."""
    from transformers import AutoProcessor

    plain, target = folder / f"plain-{preset}", folder / f"lively-{preset}"
    FAMILY.code.write_tiny(plain, TEXTS, 0, preset)
    model = reference_of(plain)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(plain).save_pretrained(target)
    return target


def reference_of(folder: Path) -> Any:
    """The folder as transformers itself loads it, in fp32."""
    from transformers import InstructBlipForConditionalGeneration

    model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load(folder: Path, dtype: str = "fp32", base_dropout: int | str = 0) -> LoadedModel:
    """The folder through the family."""
    options = ModelOptions(str(folder), None, dtype, base_dropout=base_dropout)
    return FAMILY.code.load(options, None)


def image(number: int) -> Image.Image:
    """An image with detail that no other number has."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (40, 48 + number, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def example(
    processor: Any,
    name: str,
    question: str,
    target: str,
    images: Sequence[Image.Image] = (),
    earlier: Sequence[tuple[str, str]] = (),
    instruction: str | None = None,
    max_length: int = 160,
    side: str = "left",
) -> Example:
    """One encoded conversation: earlier (question, answer) pairs, then question and target."""
    turns = [Turn(role, text) for pair in earlier for role, text in zip(ROLES, pair, strict=True)]
    rendered = Rendered((*turns, Turn("user", question)), target, instruction)
    return encoding.encode(FAMILY, processor, name, rendered, images, max_length, side)


def mixed(processor: Any) -> list[Example]:
    """With and without image, long and short, one and several turns, an own instruction."""
    return [
        example(processor, "with", "Which digit is in the picture?", "5", [image(1)]),
        example(processor, "text", "Say 7.", "7 and then 8"),
        example(
            processor,
            "turns",
            "And now?",
            "2",
            [image(2)],
            [("Which digit?", "3"), ("Why?", "4")],
        ),
        example(
            processor,
            "told",
            "Which?",
            "8 and 9",
            [image(3)],
            instruction="Which digit is in it?",
        ),
    ]


def text_and_answer(one: Example) -> tuple[list[int], list[int]]:
    """What the language model is given before the answer, and the answer."""
    answer = [label for label in one.labels if label != -100]
    is_decoder_only = len(one.labels) == len(one.input_ids) and one.labels[0] == -100
    return one.input_ids[: -len(answer)] if is_decoder_only else one.input_ids, answer


def reference_inputs(processor: Any, one: Example) -> dict[str, torch.Tensor]:
    """transformers' own arguments for one unpadded sample, its prompt taken apart from ours."""
    prompt, _ = text_and_answer(one)
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
    if one.pixels:
        inputs["pixel_values"] = torch.stack(list(one.pixels))
        inputs["qformer_input_ids"] = torch.tensor([one.extras["instruction_ids"]])
    return {name: tensor.long() if "mask" in name else tensor for name, tensor in inputs.items()}


def reference_logits(reference: Any, processor: Any, one: Example) -> torch.Tensor:
    """transformers' logits of one sample, at the positions that predict its answer."""
    _, answer = text_and_answer(one)
    inputs, target = reference_inputs(processor, one), torch.tensor([answer])
    if processor.decoder_start_token_id is not None:
        inputs["decoder_input_ids"] = reference.language_model._shift_right(target)
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        model = reference if one.pixels else reference.language_model
        logits = model(**inputs).logits[0]
    if processor.decoder_start_token_id is not None:
        return logits
    return logits[-len(answer) - 1 : -1]


def our_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Our forward up to the logits of the answer positions, one sample after another."""
    hidden, tensors = decoding.hidden_states(FAMILY, model, batch)
    picked = hidden.reshape(-1, hidden.shape[-1])[tensors["answer_positions"]]
    return model.language_model.lm_head(picked)
