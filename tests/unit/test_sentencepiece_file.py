"""A folder with `tokenizer.model` alone is cut as the sentencepiece library cuts it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mmtrain.errors import CheckpointError
from mmtrain.models.sentencepiece_file import cut_as_sentencepiece, read_where_alone
from tests.unit import instructblip_material
from tests.unit.folder_faults import copied, edit_json
from tests.unit.llava_material import load, write_lively
from tests.unit.llava_original import (
    load_original,
    train_sentencepiece,
    write_with_sentencepiece,
)
from tests.unit.sentencepiece_texts import texts

TEXTS = texts(600)
LATER = [f"{' ' * (number % 7 + 1)}{text}" for number, text in enumerate(TEXTS[:100])]
Library = sentencepiece.SentencePieceProcessor


def library_of(folder: Path) -> Library:
    return Library(model_file=str(folder / "tokenizer.model"))


def wrong(tokenizer: Any, library: Library, some: list[str]) -> list[str]:
    """The texts that the two cut differently."""
    found = tokenizer(some, add_special_tokens=False)["input_ids"]
    return [text for text, ids in zip(some, found, strict=True) if ids != library.encode(text)]


def model_alone(folder: Path, size: int) -> Path:
    """Put a sentencepiece model in the place of tokenizer.json; the image token follows it."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(size))
    image = {"content": "<image>", "special": True, "normalized": False}
    token = {str(size): {**image, "lstrip": False, "rstrip": False, "single_word": False}}
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        added_tokens_decoder=token,
        legacy=True,
    )
    return folder


def original(base: Path) -> tuple[Path, Any]:
    folder = write_with_sentencepiece(write_lively(base), base / "original", legacy=True)
    return folder, load_original(folder).processor.tokenizer


def hugging_face(base: Path) -> tuple[Path, Any]:
    folder = copied(write_lively(base), base / "copy")
    size = 380
    edit_json(folder / "config.json", image_token_index=size, image_token_id=None)
    model_alone(folder, size)
    return folder, load(folder).processor.tokenizer


def instructblip(base: Path) -> tuple[Path, Any]:
    folder = instructblip_material.write_lively(base, "tiny-vicuna")
    model_alone(folder, instructblip_material.load(folder).processor.image_token_id)
    return folder, instructblip_material.load(folder).processor.tokenizer


@pytest.mark.parametrize("read", [original, hugging_face, instructblip])
def test_600_texts_are_cut_as_by_the_library(
    tmp_path: Path, read: Callable[[Path], tuple[Path, Any]]
) -> None:
    folder, tokenizer = read(tmp_path)
    library = library_of(folder)
    assert len(TEXTS) == 600
    assert not wrong(tokenizer, library, [*TEXTS, *LATER])
    for text in TEXTS[:2]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_texts_tell_scores_from_numbers(tmp_path: Path) -> None:
    """By the merges that transformers makes, most of them are cut otherwise."""
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(380))
    tokenizer = LlamaTokenizer.from_pretrained(str(tmp_path))
    library = library_of(tmp_path)
    assert len(wrong(tokenizer, library, TEXTS)) > 200
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    file = read_where_alone(tmp_path)
    assert file is not None
    cut_as_sentencepiece(tokenizer, file)
    assert not wrong(tokenizer, library, TEXTS)


@pytest.mark.parametrize(
    ("settings", "wanted", "reason"),
    [
        ('{"legacy": false}', False, "legacy: false, as tokenizer_config.json says"),
        ('{"legacy": true}', True, "legacy: true, as tokenizer_config.json says"),
        ('{"legacy": null}', True, "legacy: true, the published default"),
        ("{}", True, "legacy: true, the published default"),
        (None, True, "legacy: true, the published default"),
    ],
)
def test_legacy_is_the_folders(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: str | None,
    wanted: bool,
    reason: str,
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(380))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with caplog.at_level(logging.INFO, "mmtrain"):
        file = read_where_alone(tmp_path)
    assert file is not None and file.legacy is wanted
    assert reason in caplog.text


@pytest.mark.parametrize("damage", ["another", "cut", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    data = {"another": b"\x99no model at all", "cut": train_sentencepiece(380)[:5000], "empty": b""}
    (tmp_path / "tokenizer.model").write_bytes(data[damage])
    with pytest.raises(CheckpointError, match="tokenizer.model: no sentencepiece model") as caught:
        read_where_alone(tmp_path)
    assert "\n" not in str(caught.value)


def _no_space_in_front(model: Any) -> None:
    model.normalizer_spec.add_dummy_prefix = False


def _fewer_spaces(model: Any) -> None:
    model.normalizer_spec.remove_extra_whitespaces = True


def _symbol_of_its_own(model: Any) -> None:
    model.pieces.add(piece="<|im|>", type=model.SentencePiece.USER_DEFINED)


@pytest.mark.parametrize("legacy", ["true", "false"])
@pytest.mark.parametrize("change", [_no_space_in_front, _fewer_spaces, _symbol_of_its_own])
def test_a_file_that_is_not_like_llamas_is_an_error(
    tmp_path: Path, change: Callable[[Any], None], legacy: str
) -> None:
    """transformers and we would cut its texts otherwise, in silence."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import LlamaTokenizer

    model = sentencepiece_model_pb2.ModelProto.FromString(train_sentencepiece(380))
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"legacy": {legacy}}}')
    tokenizer = LlamaTokenizer.from_pretrained(str(tmp_path))
    file = read_where_alone(tmp_path)
    assert file is not None
    with pytest.raises(CheckpointError, match="tokenizer.model: .* is cut otherwise than by"):
        cut_as_sentencepiece(tokenizer, file)
