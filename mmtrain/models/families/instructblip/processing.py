"""The folder's processor: two tokenizers and the image side, checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError
from mmtrain.models import building
from mmtrain.models.families.instructblip.encoding import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Processor:
    """What encoding needs of a checkpoint folder."""

    hf: Any  # transformers' processor; None where nothing is encoded
    image_token_id: int
    image_size: int
    num_query_tokens: int
    instruction_positions: int  # that the Q-Former has
    decoder_start_token_id: int | None  # T5's answers begin behind it; None: decoder-only
    control_tokens: tuple[str, ...]
    qformer_control_tokens: tuple[str, ...]

    @property
    def tokenizer(self) -> Any:
        """Of what the language model reads."""
        return self.hf.tokenizer

    @property
    def qformer_tokenizer(self) -> object:
        """Of instructions."""
        return self.hf.qformer_tokenizer

    @property
    def image_processor(self) -> object:
        """Resizes and normalises."""
        return self.hf.image_processor

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end of an answer."""
        return (self.tokenizer.eos_token_id,)

    def save_pretrained(self, folder: str) -> None:
        """The files that transformers reads."""
        self.hf.save_pretrained(folder)


def load_processor(folder: Path, config: PretrainedConfig) -> Processor:
    """The folder's processor, and what encoding needs to know of the model."""
    _refuse_missing_tokenizers(folder)
    hf = building.load_processor(folder, IMAGE_TOKEN, config.image_token_id)
    # Older folders say nothing of image tokens: it is the first id behind the tokenizer's.
    config.image_token_id = hf.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _refuse_other_sizes(folder, hf, config)
    size, wanted = hf.image_processor.size, config.vision_config.image_size
    building.refuse_other_image_size(folder, (size.get("height"), size.get("width")), wanted)
    hf.num_query_tokens = config.num_query_tokens  # older folders leave it out
    return Processor(
        hf=hf,
        image_token_id=config.image_token_id,
        image_size=wanted,
        num_query_tokens=config.num_query_tokens,
        instruction_positions=config.qformer_config.max_position_embeddings,
        decoder_start_token_id=_decoder_start(folder, config.text_config),
        control_tokens=(IMAGE_TOKEN, *_control_tokens(hf.tokenizer)),
        qformer_control_tokens=_control_tokens(hf.qformer_tokenizer),
    )


def _decoder_start(folder: Path, text: Any) -> int | None:
    """The token that T5's answers begin behind; None for a decoder-only model."""
    if text.model_type != "t5":
        return None
    # transformers knows of none by itself.
    start = getattr(text, "decoder_start_token_id", None)
    if start is None:
        raise CheckpointError(
            f"{folder}/config.json: names no decoder_start_token_id for its T5.",
            "Copy it again, or write it into text_config (0 in the published checkpoints).",
        )
    return int(start)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The spellings that do not stand for themselves; T5's marks of gaps are among them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added.union(tokenizer.all_special_tokens)))


def _refuse_missing_tokenizers(folder: Path) -> None:
    """transformers would make up a blank tokenizer, or take the other one in its place."""
    for place in (folder, folder / "qformer_tokenizer"):
        if not any((place / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"{place}: no usable tokenizer there: none of {', '.join(_TOKENIZER_FILES)}.",
                "Copy tokenizer files and the folder qformer_tokenizer from the published"
                " checkpoint.",
            )


def _refuse_other_sizes(folder: Path, processor: Any, config: PretrainedConfig) -> None:
    """Every token but the image's is looked up."""
    words = set(processor.tokenizer.get_vocab().values()) - {config.image_token_id}
    building.refuse_larger_tokenizer(folder, max(words) + 1, config.text_config.vocab_size)
    instruction_words = processor.qformer_tokenizer.get_vocab().values()
    building.refuse_larger_tokenizer(
        folder / "qformer_tokenizer", max(instruction_words) + 1, config.qformer_config.vocab_size
    )
