"""Files are replaced whole or not at all, and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mmtrain.files import lock, replace_file, replaced_folder
from mmtrain.tracking import client as client_module
from mmtrain.tracking.client import TrackingError, parent_run


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    path = tmp_path / "état.json"
    replace_file(path, "é", sync)
    replace_file(path, b"new", sync)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    if sync:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, "lost", sync=True)
        assert path.read_bytes() == b"new"


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "folder", Path.rename
    for content in ("old", "new"):
        with replaced_folder(folder) as partial:
            (partial / "file").write_text(content)
    assert (folder / "file").read_text() == "new" and list(tmp_path.iterdir()) == [folder]

    def refused(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output"), replaced_folder(folder) as partial:
        (partial / "file").write_text("lost")
    assert (folder / "file").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


def test_one_holds_a_file_or_a_folder_at_a_time(tmp_path: Path) -> None:
    for path in (tmp_path / "file", tmp_path):
        with open(tmp_path / "file", "a"):
            first, second = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
        assert lock(first) and not lock(second) and not lock(second, wait_s=0.2)
        os.close(first)
        assert lock(second)
        os.close(second)


def test_a_lock_that_nobody_lets_go_of_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_USE_LIMIT_S", 0.3)
    lock = tmp_path / "mlflow.db.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrackingError, match="held by another process") as caught:
            parent_run(f"sqlite:///{tmp_path}/mlflow.db", "locked", "study")
    assert f"fuser {lock}" in str(caught.value)
    assert not (tmp_path / "mlflow.db").exists()
