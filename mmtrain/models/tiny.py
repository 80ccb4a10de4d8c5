"""Tiny checkpoints of the real classes, for the demo, the tests and a first look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


Skeleton = Callable[[Any], Any]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
DEFAULT_SPREAD = 0.02
# Near one over the root of the width: with the usual spread so narrow a model learns slowly.
NARROW_SPREAD = 0.1


def train_tokenizer(texts: Sequence[str], image_token: str, vocabulary: int = 512) -> Any:
    """A byte-level BPE tokenizer trained on the texts, Llama-like in its special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts), trainer)
    tokenizer.add_special_tokens([AddedToken(image_token, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": image_token},
    )


def write_llava_folder(
    skeleton: Skeleton,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int,
) -> None:
    """Weights, configuration, tokenizer and processor of a LLaVA-shaped model."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=config_image_token(tokenizer, config),
    )
    write_model(skeleton, config, folder, seed, DEFAULT_SPREAD)
    processor.save_pretrained(str(folder))


def write_model(
    skeleton: Skeleton,
    config: PretrainedConfig,
    folder: Path,
    seed: int,
    weight_spread: float,
    finish: Callable[[Any], None] = lambda model: None,
) -> None:
    """Configuration and random weights; `finish` sets what is computed and not drawn."""
    import torch

    from mmtrain.models.weights import initialise_weights

    folder.mkdir(parents=True, exist_ok=True)
    model = skeleton(config).to(torch.float32)
    initialise_weights(dict(model.named_parameters()), seed, weight_spread)
    finish(model)
    model.save_pretrained(str(folder))


def config_image_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> str:
    """The text of the configuration's image token."""
    return str(tokenizer.convert_ids_to_tokens(config.image_token_id))
