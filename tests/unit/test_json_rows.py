"""Objects of any size that are read entry by entry; lists and lines: test_own_data.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.errors import DataError
from mmtrain.tasks.json_rows import read_items, read_list


def test_lists_in_an_object_are_read_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtrain.tasks.json_rows._CHUNK_CHARACTERS", 3)
    content = {
        "a": {"data": [7]},
        "none": [],
        "b": [[1], {"data": 2}],
        "data": [{"é": 1}, 2],
        "c": 3,
    }
    for text in (json.dumps(content), json.dumps(content, indent=2).replace("\n", "\r\n")):
        (tmp_path / "a.json").write_bytes(f"\ufeff{text}\n".encode())
        assert [entry for _, entry in read_list(tmp_path / "a.json", "data")] == [{"é": 1}, 2]
        assert list(read_list(tmp_path / "a.json", "none")) == []
        assert dict(read_items(tmp_path / "a.json")) == content
        for key in ("a", "c", "d"):
            with pytest.raises(DataError, match=f"it has no list '{key}'"):
                list(read_list(tmp_path / "a.json", key))


@pytest.mark.parametrize(
    "text", ['{"data": [1}', '{"data": [1], }', '{"data" [1]}', "{1: [1]}", "[]"]
)
def test_damaged_objects_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    for reading in (lambda path: read_list(path, "data"), read_items):
        with pytest.raises(DataError, match="a.json"):
            list(reading(tmp_path / "a.json"))
