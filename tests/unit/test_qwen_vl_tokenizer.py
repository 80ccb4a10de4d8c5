"""The tokenizer of qwen.tiktoken against byte-pair encoding by rank, done by hand."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from mmtrain.errors import CheckpointError
from mmtrain.models.families.qwen_vl.tokenizer import QwenTokenizer, load_tokenizer, train
from tests.unit.qwen_vl_material import GOLDEN, PUBLISHED

TEXTS = (
    "Which digit is in the picture?\nOptions: 0, 12, 345.",
    "I'll say we'Ve DON'T   spaces  \n\n\t tabs\r\n and\u00a0more ",
    "Größe, naïve, déjà vu; cafe\u0301 decomposed",
    "世界你好，今天天气怎么样？ 日本語のテキスト",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया ไทย",
    "🙂👩‍👩‍👧 ∑∫≠ …—“quoted” x²",
    "a" * 200 + " " * 60 + "!" * 50,
    "<|im_end|><img>x</img><|endoftext|>",
    "",
)
WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_rank(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """Join the neighbours that make the token of lowest rank, until none do."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[place : place + 1] for place in range(len(word))]
    while len(parts) > 1:
        known = [
            (ranks[a + b], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in ranks
        ]
        if not known:
            break
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]


def by_hand(ranks: dict[bytes, int], text: str) -> list[int]:
    words = WORDS.findall(unicodedata.normalize("NFC", text))
    return [one for word in words for one in by_rank(ranks, word.encode())]


def read_ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def random_texts(count: int) -> list[str]:
    """Of letters from many scripts, spaces and signs."""
    chance = random.Random(5)
    letters = (
        "abcdefgh ijkl EIOU  \n\r\t'0123.,!?-éßñüøčł你世界的是不русский עברית नम 🙂\u0301\u200d"
    )
    return ["".join(chance.choices(letters, k=chance.randint(1, 60))) for _ in range(count)]


@cache
def excerpt(folder: Path) -> QwenTokenizer:
    """The first thousand of the published ranks."""
    (folder / "qwen.tiktoken").write_bytes((GOLDEN / "first-1000.tiktoken").read_bytes())
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QwenTokenizer:
    return excerpt(tmp_path_factory.mktemp("excerpt"))


def test_ids_equal_encoding_by_hand(tokenizer: QwenTokenizer) -> None:
    ranks = read_ranks(GOLDEN / "first-1000.tiktoken")
    assert len(ranks) == 1000
    for text in (*TEXTS, *random_texts(300)):
        assert tokenizer.ids(text) == by_hand(ranks, text), text


def test_text_comes_back(tokenizer: QwenTokenizer) -> None:
    for text in (*TEXTS, *random_texts(100)):
        assert tokenizer.decode(tokenizer.ids(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_in_the_published_order(tokenizer: QwenTokenizer) -> None:
    places = {token: number - 1000 for token, number in tokenizer.special.items()}
    assert [places[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end")] == [0, 1, 2]
    assert (places["<|extra_0|>"], places["<|extra_204|>"]) == (3, 207)
    tags = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>")
    assert [places[tag] for tag in (*tags, "<imgpad>")] == list(range(208, 217))
    assert len(tokenizer) == 1217 and tokenizer.pad_token_id == 1000
    for token, number in tokenizer.special.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer.decode([number]) == token
        assert tokenizer.decode([number], skip_special_tokens=True) == ""
        assert number not in tokenizer.ids(token)


def test_rows_of_a_batch_decode_alone(tokenizer: QwenTokenizer) -> None:
    """Broken characters and ids beyond the vocabulary are no reason to stop."""
    rows = [[*tokenizer.ids("5"), 1002, 1000], [tokenizer.ids("世")[0]], [1217, 1_000_000]]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["5", "\ufffd", ""]


def test_a_saved_tokenizer_is_the_published_file(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    written = (tmp_path / "qwen.tiktoken").read_bytes()
    assert written == (GOLDEN / "first-1000.tiktoken").read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "QWenTokenizer" and "auto_map" not in settings


def test_a_trained_tokenizer_is_of_the_same_kind(tmp_path: Path) -> None:
    small = train(["Which digit is in the picture?"] * 2, 300)
    small.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert 256 < len(again.ranks) <= 300 and again.special["<img>"] == len(again.ranks) + 214
    for text in (*TEXTS, "Which digit is in the picture?"):
        wanted = by_hand(dict(again.ranks), text)
        assert small.ids(text) == again.ids(text) == wanted
    assert len(again.ids("Which digit is in the picture?")) < 20


FAULTS = {
    "cut within a line": (lambda data: data[:-5], "damaged|are not the ranks"),
    "no base64": (lambda data: b"IQ=! 0\n" + data, "damaged"),
    "a rank twice": (lambda data: data + b"enp6eno= 999\n", "1001 lines are not the ranks"),
    "a token twice": (lambda data: data + b"IQ== 1000\n", "1001 lines are not the ranks"),
    "a byte missing": (lambda data: data[data.index(b"\n") + 1 :], "999 lines are not the ranks"),
    "empty": (lambda data: b"", "0 lines are not the ranks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, fault: str) -> None:
    harm, named = FAULTS[fault]
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(harm((GOLDEN / "first-1000.tiktoken").read_bytes()))
    with pytest.raises(CheckpointError, match=named) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_published_tokenizer() -> None:
    if not (PUBLISHED / "qwen.tiktoken").is_file():
        pytest.skip(f"the published qwen.tiktoken is not at {PUBLISHED}")
    tokenizer = load_tokenizer(PUBLISHED)
    assert len(tokenizer) == 151860
    special = tokenizer.special
    assert [special[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end")] == [
        *(151643, 151644, 151645)
    ]
    assert [special[tag] for tag in ("<img>", "</img>", "<imgpad>")] == [151857, 151858, 151859]
    # Well known from Qwen's own examples.
    assert tokenizer.ids("You are a helpful assistant.") == [2610, 525, 264, 10950, 17847, 13]
    assert [tokenizer.ids(word) for word in ("system", "user", "assistant", "\n")] == [
        *([8948], [872], [77091], [198])
    ]
    ranks = read_ranks(PUBLISHED / "qwen.tiktoken")
    for text in (*TEXTS, *random_texts(300)):
        assert tokenizer.ids(text) == by_hand(ranks, text), text
    assert list(ranks)[:1000] == list(read_ranks(GOLDEN / "first-1000.tiktoken"))
