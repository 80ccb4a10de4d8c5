"""The folder's processor: two tokenizers and the picture side, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtrain.errors import CheckpointError
from mmtrain.models import building
from mmtrain.models.families.instructblip.encoding import IMAGE_TOKEN

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt")


def load_processor(folder: Path, config: Any) -> Any:
    """The processor, and what encoding needs to know of the model."""
    _refuse_missing_tokenizers(folder)
    processor = building.load_processor(folder, IMAGE_TOKEN, config.image_token_id)
    _refuse_other_sizes(folder, processor, config)
    _refuse_other_picture_size(folder, processor, config)
    # Older folders say nothing of picture tokens: it is the first id behind the tokenizer's.
    config.image_token_id = processor.image_token_id
    processor.num_query_tokens = config.num_query_tokens
    processor.instruction_positions = config.qformer_config.max_position_embeddings
    text = config.text_config
    is_decoder_only = text.model_type != "t5"
    processor.decoder_start_token_id = None if is_decoder_only else text.decoder_start_token_id
    return processor


def _refuse_missing_tokenizers(folder: Path) -> None:
    """transformers would make up a blank tokenizer, or take the other one in its place."""
    for place in (folder, folder / "qformer_tokenizer"):
        if not any((place / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"{place}: no usable tokenizer there: none of {', '.join(_TOKENIZER_FILES)}.",
                "Copy tokenizer files and the folder qformer_tokenizer from the published"
                " checkpoint.",
            )


def _refuse_other_sizes(folder: Path, processor: Any, config: Any) -> None:
    """Every token but the picture's is looked up."""
    words = set(processor.tokenizer.get_vocab().values()) - {processor.image_token_id}
    needed = {
        "the tokenizer": (max(words) + 1, config.text_config.vocab_size),
        "the Q-Former's tokenizer": (
            max(processor.qformer_tokenizer.get_vocab().values()) + 1,
            config.qformer_config.vocab_size,
        ),
    }
    for name, (num_tokens, num_rows) in needed.items():
        if num_tokens > num_rows:
            raise CheckpointError(
                f"{folder}: {name} has {num_tokens} tokens, config.json says {num_rows}.",
                "Use tokenizers and config.json of the same checkpoint.",
            )


def _refuse_other_picture_size(folder: Path, processor: Any, config: Any) -> None:
    size, wanted = processor.image_processor.size, config.vision_config.image_size
    found = (size.get("height"), size.get("width"))
    if found != (wanted, wanted):
        raise CheckpointError(
            f"{folder}: its processor makes pictures of {found[0]} x {found[1]},"
            f" config.json says {wanted} x {wanted}.",
            "Use preprocessor files and config.json of the same checkpoint.",
        )
