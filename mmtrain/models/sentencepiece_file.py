"""Text cut as the sentencepiece library cuts it, where a folder has `tokenizer.model` alone.

transformers makes merges of such a file in the order of the pieces' numbers. LLaMA's runs of spaces
have low numbers and the lowest score: they would be joined first, sentencepiece joins them last.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmtrain.models.weights import read_json

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # as pieces spell it
log = logging.getLogger("mmtrain")


def is_alone(folder: Path) -> bool:
    """Whether nobody made a tokenizer.json of the folder's sentencepiece model."""
    return (folder / MODEL_FILE).is_file() and not (folder / "tokenizer.json").exists()


def is_legacy(folder: Path) -> bool:
    """Whether a space goes before every text behind a special token, not only before the first.

    So says tokenizer_config.json. Where it does not, or is not there, it is so: the transformers
    that LLaVA and InstructBLIP were published with knew nothing else, or took it for granted.
    """
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("legacy") if settings.exists() else None
    legacy = True if found is None else bool(found)
    reason = "the published default" if found is None else f"as {settings.name} says"
    log.info("%s: read with legacy: %s, %s", folder / MODEL_FILE, str(legacy).lower(), reason)
    return legacy


def cut_as_sentencepiece(tokenizer: Any, folder: Path, legacy: bool) -> None:
    """Give a byte-pair tokenizer that transformers made of the folder's file the right merges.

    Equal ids but for one case, which transformers decides for both of its classes: without
    `legacy`, a text that begins with a space gets no second one.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.BPE):
        return
    library = SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    numbers = range(library.get_piece_size())
    vocabulary = {library.id_to_piece(number): number for number in numbers}
    scores = {library.id_to_piece(number): library.get_score(number) for number in numbers}
    # Text never becomes one of these, whatever it spells.
    marks = [
        piece
        for piece, number in vocabulary.items()
        if library.is_control(number) or library.is_unknown(number) or library.is_byte(number)
    ]
    backend.model = models.BPE(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores, marks),
        unk_token=library.id_to_piece(library.unk_id()),
        fuse_unk=True,
        byte_fallback=True,
    )
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        backend.pre_tokenizer = None
    else:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
