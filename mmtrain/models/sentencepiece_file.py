"""Text cut as the sentencepiece library cuts it, where a folder has `tokenizer.model` alone.

transformers makes merges of such a file in the order of the pieces' numbers. LLaMA's runs of spaces
have low numbers and the lowest score: they would be joined first, sentencepiece joins them last.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError
from mmtrain.models.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SPACE = "\u2581"  # as pieces spell it
# Spaces, lines, bytes and what a normalisation would change. None begins with a space.
_PROBES = (
    "two  spaces and 12.",
    "a\n\n\tb   c ",
    "\u00e9 \ufb01 \uff21 \u00bd \U0001f642",
    "<0x0A>x",
)
log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class SentencePieceFile:
    """`tokenizer.model`, and how a folder wants it read."""

    path: Path
    library: Any  # sentencepiece's own processor
    # Whether a space goes before every text behind a special token, not only before the first.
    legacy: bool


def read_where_alone(folder: Path) -> SentencePieceFile | None:
    """The folder's file; None where there is none, or where somebody made a tokenizer.json of it.

    Call it before transformers reads the folder: of a damaged file that would say "no tiktoken".
    """
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").exists():
        return None
    try:
        library = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: no sentencepiece model ({fault}).", "Copy it from the published checkpoint."
        ) from error
    return SentencePieceFile(path, library, _is_legacy(folder))


def _is_legacy(folder: Path) -> bool:
    """So says tokenizer_config.json. Where it says nothing, or is not there, it is so.

    The transformers that LLaVA and InstructBLIP were published with knew nothing else, or took it
    for granted.
    """
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("legacy") if settings.exists() else None
    legacy = True if found is None else bool(found)
    reason = "the published default" if found is None else f"as {settings.name} says"
    log.info(
        "%s: read with legacy: %s, %s", folder / "tokenizer.model", str(legacy).lower(), reason
    )
    return legacy


def cut_as_sentencepiece(tokenizer: PreTrainedTokenizerBase, file: SentencePieceFile) -> None:
    """Give a byte-pair tokenizer that transformers made of the file the right merges.

    Equal ids but for one case, which transformers decides for both of its classes: without
    `legacy`, a text that begins with a space gets no second one. A file that is not LLaMA-like
    cannot be cut so, which is an error.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    backend, library = tokenizer.backend_tokenizer, file.library
    if not isinstance(backend.model, models.BPE):
        return
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
    if file.legacy:
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
    _refuse_another_cut(tokenizer, file)


def _refuse_another_cut(tokenizer: PreTrainedTokenizerBase, file: SentencePieceFile) -> None:
    """A file may put no space before a text, normalise it, or have symbols of its maker's own."""
    probes = [
        *_PROBES,
        *(f"{piece}a{piece} b {piece}{piece}  c" for piece in _user_defined(file.library)),
    ]
    found = tokenizer(probes, add_special_tokens=False)["input_ids"]
    wanted = file.library.encode(probes)
    wrong = [text for text, ids, right in zip(probes, found, wanted) if ids != right]
    if wrong:
        raise CheckpointError(
            f"{file.path}: read as LLaMA's, {wrong[0]!r} is cut otherwise than by sentencepiece.",
            "Put the publisher's tokenizer.json beside it, which is then read instead.",
        )


def _user_defined(library: Any) -> list[str]:
    """Pieces that are cut out of a text before anything else."""
    from sentencepiece import sentencepiece_model_pb2 as formats

    proto: Any = formats  # made at run time, from the format itself
    model = proto.ModelProto.FromString(library.serialized_model_proto())
    return [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
