"""Tiny checkpoints of the real classes, with a tokenizer of the published kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.models import tiny
from mmtrain.models.families.qwen2_vl.processing import (
    IMAGE_TOKEN,
    SYSTEM,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    make_processor,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


TEXT_END = "<|endoftext|>"
VIDEO_TOKEN = "<|video_pad|>"
# In the published order.
ADDED_TOKENS = (
    TEXT_END,
    TURN_START,
    TURN_END,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_TOKEN,
    VIDEO_TOKEN,
)
VOCABULARY = 448  # without the added tokens
_ROUND_TO = 64  # published embeddings have more rows than the tokenizer has tokens
# 32 x 32 stays as it is; the largest image makes 8 x 8 tokens.
MIN_PIXELS, MAX_PIXELS = 16 * 16, 64 * 64


def train_tokenizer(texts: Sequence[str], system: str | None) -> Any:
    """A byte-level BPE tokenizer of the Qwen2 class, trained on the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([*texts, "system\nuser\nassistant\n", system or ""], trainer)
    learnt = json.loads(trained.to_str())["model"]
    options: dict[str, Any] = dict(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token=TURN_END,
        pad_token=TEXT_END,
        unk_token=None,
        extra_special_tokens=list(ADDED_TOKENS),
    )
    tokenizer = Qwen2Tokenizer(**options)
    tokenizer.chat_template = chat_template(system)
    return tokenizer


def chat_template(system: str | None) -> str:
    """What the published templates say of conversations with images."""
    default = f"{TURN_START}system\n{system}{TURN_END}\n"
    opening = "{% if loop.first and message.role != 'system' %}" + default + "{% endif %}"
    image = f"{VISION_START}{IMAGE_TOKEN}{VISION_END}"
    part = "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
    return (
        "{% for message in messages %}"
        + (opening if system is not None else "")
        + TURN_START
        + "{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
        + "{% for part in message.content %}"
        + part
        + "{% endfor %}{% endif %}"
        + TURN_END
        + "\n{% endfor %}{% if add_generation_prompt %}"
        + TURN_START
        + "assistant\n{% endif %}"
    )


def write(
    skeleton: tiny.Skeleton, config: PretrainedConfig, texts: Sequence[str], seed: int, folder: Path
) -> None:
    """Weights, configuration, tokenizer and image processor of a tiny model."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    tokenizer = train_tokenizer(texts, SYSTEM[config.model_type])
    to_id = tokenizer.convert_tokens_to_ids
    config.text_config.vocab_size = -(-len(tokenizer) // _ROUND_TO) * _ROUND_TO
    config.text_config.eos_token_id = to_id(TURN_END)
    config.image_token_id, config.video_token_id = to_id(IMAGE_TOKEN), to_id(VIDEO_TOKEN)
    config.vision_start_token_id = to_id(VISION_START)
    config.vision_end_token_id = to_id(VISION_END)
    vision = config.vision_config
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
    )
    tiny.write_model(skeleton, config, folder, seed, tiny.NARROW_SPREAD)
    make_processor(tokenizer, image_processor, config.model_type).save_pretrained(str(folder))
