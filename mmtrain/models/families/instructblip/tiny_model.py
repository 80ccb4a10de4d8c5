"""Tiny checkpoints of the real classes, with tokenizers of the published kinds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import printable
from typing import TYPE_CHECKING, Any

from mmtrain.models import tiny
from mmtrain.models.families.instructblip.encoding import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PretrainedConfig


VOCABULARY = 384
_ROUND_TO = 64  # published embeddings have more rows than the tokenizer has tokens
_CHARACTERS = sorted(set(printable) - set("\t\n\r\x0b\x0c"))


def write(
    skeleton: tiny.Skeleton, config: PretrainedConfig, texts: Sequence[str], seed: int, folder: Path
) -> None:
    """Weights, configuration, tokenizers and image processor of a tiny model."""
    from transformers import InstructBlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    is_t5 = config.text_config.model_type == "t5"
    tokenizer = t5_tokenizer(texts) if is_t5 else llama_tokenizer(texts)
    qformer_tokenizer = bert_tokenizer(texts)
    size = config.vision_config.image_size
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": size, "width": size}),
        tokenizer,
        qformer_tokenizer,
        num_query_tokens=config.num_query_tokens,
    )
    config.text_config.vocab_size = -(-len(tokenizer) // _ROUND_TO) * _ROUND_TO
    config.qformer_config.vocab_size = len(qformer_tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tiny.write_model(skeleton, config, folder, seed, tiny.NARROW_SPREAD)
    processor.save_pretrained(str(folder))


def t5_tokenizer(texts: Sequence[str]) -> Any:
    """Unigram pieces, an end token behind every text and no begin token."""
    from transformers import T5Tokenizer

    # Found as byte pairs are: the trainer for unigram pieces gives others at each call. With equal
    # costs a text is cut into as few pieces as it can be; of equally few, into the commonest.
    pieces, _ = _byte_pairs(texts, ["<pad>", "</s>", "<unk>"], _CHARACTERS)
    costs = [(piece, -1.0 - rank / 10_000) for rank, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=costs, extra_ids=0)


def llama_tokenizer(texts: Sequence[str]) -> Any:
    """Byte pairs with bytes to fall back on, a begin token before every text."""
    from transformers import LlamaTokenizer

    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces, merges = _byte_pairs(texts, ["<unk>", "<s>", "</s>", *single_bytes])
    return LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        pad_token="<unk>",
        add_bos_token=True,
    )


def _byte_pairs(
    texts: Sequence[str], special: list[str], alphabet: Sequence[str] = ()
) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces by id, and merges, that suit the texts; words begin with a low line."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(list(texts), trainer)
    learnt = json.loads(trained.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in learnt["merges"]]


def bert_tokenizer(texts: Sequence[str]) -> Any:
    """Lower-case words and characters between [CLS] and [SEP]; the first stages' token is last."""
    from transformers import BertTokenizer

    blank = BertTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        plain = blank.normalizer.normalize_str(text)
        words.update(word for word, _ in blank.pre_tokenizer.pre_tokenize_str(plain))
    common = sorted(words, key=lambda word: (-words[word], word))[:VOCABULARY]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common]
    pieces += [form for one in _CHARACTERS if one != " " for form in (one, f"##{one}")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
