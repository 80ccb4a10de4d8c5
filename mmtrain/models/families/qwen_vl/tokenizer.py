"""The tokenizer of `qwen.tiktoken`: byte-pair encoding by rank, and special tokens behind it.

Text never becomes a special token here, whatever it spells: those are put in by id, where the form
of a conversation asks for them. The tags of grounding data are texts' own, where they are allowed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from mmtrain.errors import CheckpointError

FILE = "qwen.tiktoken"
TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
SPECIAL_TOKENS = (
    *(TEXT_END, TURN_START, TURN_END),
    *(f"<|extra_{number}|>" for number in range(205)),
    *GROUNDING_TOKENS,
    *(IMAGE_START, IMAGE_END, IMAGE_PAD),
)
_SETTINGS = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
# Where the published tokenizer cuts text before it looks for pairs.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class QwenTokenizer:
    """Ordinary tokens are numbered by rank; the special ones follow."""

    bos_token_id = None  # texts begin with no token of their own

    def __init__(self, ranks: Mapping[bytes, int], grounding: bool = False) -> None:
        self.ranks = ranks
        self._of_texts = GROUNDING_TOKENS if grounding else ()  # special tokens that texts hold
        self._cut = re.compile(f"({'|'.join(map(re.escape, self._of_texts)) or '(?!)'})")
        self.special = {token: len(ranks) + n for n, token in enumerate(SPECIAL_TOKENS)}
        self._bytes = sorted(ranks, key=lambda token: ranks[token])
        self._pairs = _pair_encoder(ranks)

    @property
    def pad_token_id(self) -> int:
        """Of the token that fills up finished answers."""
        return self.special[TEXT_END]

    @property
    def eos_token_id(self) -> list[int]:
        """An answer ends with its turn, as published when another turn begins, or with the text."""
        return [self.special[token] for token in (TURN_END, TURN_START, TEXT_END)]

    def __len__(self) -> int:
        return len(self.ranks) + len(self.special)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, in Unicode's composed form as published."""
        composed = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        for stretch in self._cut.split(composed):
            if stretch in self._of_texts:
                ids.append(self.special[stretch])
            else:
                ids += self._pairs.encode(stretch, add_special_tokens=False).ids
        return ids

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token by its spelling; special tokens go first."""
        return self.special.get(token, self.ranks.get(token.encode()))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens; ids beyond the vocabulary, which embeddings round up, are nothing.

        Special tokens that texts may hold are never skipped: an answer's boxes are its point.
        """
        skipped = set(SPECIAL_TOKENS).difference(self._of_texts) if skip_special_tokens else set()
        parts = []
        for one in map(int, ids):
            if one < len(self._bytes):
                parts.append(self._bytes[one])
            elif one < len(self):
                token = SPECIAL_TOKENS[one - len(self._bytes)]
                parts.append(b"" if token in skipped else token.encode())
        return b"".join(parts).decode("utf-8", errors="replace")

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of every row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def save_pretrained(self, folder: str) -> None:
        """The published files."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        lines = (f"{base64.b64encode(t).decode()} {n}\n" for n, t in enumerate(self._bytes))
        (target / FILE).write_text("".join(lines), encoding="ascii")
        (target / "tokenizer_config.json").write_text(json.dumps(_SETTINGS, indent=2) + "\n")


def load_tokenizer(folder: Path, grounding: bool = False) -> QwenTokenizer:
    """The tokenizer of a checkpoint folder; whether texts may hold the tags of grounding data."""
    path = folder / FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no readable {FILE} there ({error.strerror}).",
            "Copy it from the published checkpoint.",
        ) from error
    try:
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path}: damaged ({error}).", "Copy it again.") from error
    # Cut short, single bytes or ranks are missing: every text needs them.
    numbered = sorted(ranks.values()) == list(range(len(pairs)))
    if not numbered or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path}: its {len(pairs)} lines are not the ranks 0 to {len(pairs) - 1} of as many"
            " tokens, with every single byte among them.",
            "Copy it again.",
        )
    return QwenTokenizer(ranks, grounding)


def train(texts: Sequence[str], num_tokens: int) -> QwenTokenizer:
    """A small tokenizer of the same kind."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _cutter()
    trainer = BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    trained.train_from_iterator(composed, trainer)
    byte_of = {letter: byte for byte, letter in enumerate(_letters())}
    return QwenTokenizer(
        {
            bytes(byte_of[letter] for letter in token): rank
            for token, rank in trained.get_vocab().items()
        }
    )


def _letters() -> list[str]:
    """A printable letter for every byte, as byte-level tokenizers spell them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _cutter() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pair_encoder(ranks: Mapping[bytes, int]) -> Tokenizer:
    """An encoder that joins neighbours in the order of the rank of what they make."""
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for cut in range(1, len(token))
        if token[:cut] in spelled and token[cut:] in spelled
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    encoder.pre_tokenizer = _cutter()
    return encoder
