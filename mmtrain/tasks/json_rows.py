"""JSON of any size, one row at a time: a list, an object, or one object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmtrain.errors import DataError

_CHUNK_CHARACTERS = 1 << 20
_LONGEST_ROW_CHARACTERS = 1 << 26
_SIGN = re.compile(r"[^ \t\r\n]")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(its place, the row) of every row of a `.jsonl` file or of a `.json` file with a list."""
    with _opened(path) as file:
        first = _first_sign(file)
        file.seek(0)
        yield from _Listed(file, path).rows() if first == "[" else _lines(file, path)


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of every item of the object that a `.json` file holds."""
    with _opened(path) as file:
        listed = _Listed(file, path)
        for key in listed.keys():
            yield key, listed.entry()


def read_list(path: Path, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """(its place, the entry) of every entry of a `.json` file's list, or of its object's `key`."""
    with _opened(path) as file:
        listed = _Listed(file, path)
        yield from listed.rows() if key is None else listed.list_of(key)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        # A byte order mark is none of the text.
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except OSError as fault:
        raise DataError(
            f"'{path}' is not readable ({fault.strerror});", "give --raw the file with the rows."
        ) from fault
    except UnicodeDecodeError as fault:
        raise DataError(f"'{path}' is not UTF-8: {fault.reason};", "write it again.") from fault


def _first_sign(file: IO[str]) -> str:
    while text := file.read(_CHUNK_CHARACTERS):
        if text.strip():
            return text.lstrip()[0]
    return ""


def _lines(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line-{number}", json.loads(line)
            except (ValueError, RecursionError) as fault:
                raise DataError(
                    f"'{path}', line {number}: not valid JSON: {fault};",
                    "give one JSON object per line, or one list of all.",
                ) from fault


class _Listed:
    """A list or an object that is read as far as its next entry needs."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0
        self._decoder, self._number = json.JSONDecoder(), 0

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(its place, the entry) of every entry of a list."""
        for number in self._entries("[", "]"):
            yield f"row-{number}", self.entry()

    def keys(self) -> Iterator[str]:
        """Every key of an object; its value must be read before the next is asked for."""
        for _ in self._entries("{", "}"):
            key = self.entry()
            if not isinstance(key, str) or self._sign() != ":":
                raise self._fault("no text with ':' behind it")
            self._at += 1
            self._sign()
            yield key

    def list_of(self, key: str) -> Iterator[tuple[str, Any]]:
        """The rows of the list that an object has under a key."""
        found = False
        for name in self.keys():
            if self._sign() != "[":
                self.entry()
            elif name == key:
                found = True
                yield from self.rows()
            else:
                for _ in self.rows():
                    pass
        if not found:
            raise self._fault(f"it has no list '{key}'")

    def _entries(self, opening: str, closing: str) -> Iterator[int]:
        """Stands before every entry in turn, and says its number."""
        if self._sign() != opening:
            raise self._fault(f"no '{opening}'")
        self._at += 1
        number = 0
        while (sign := self._sign()) != closing:
            if number:
                if sign != ",":
                    raise self._fault(f"no comma or '{closing}' behind it")
                self._at += 1
                self._sign()
            number += 1
            self._number = number
            yield number
        self._at += 1

    def _sign(self) -> str:
        """The next sign that is no white space."""
        while (found := _SIGN.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if not self._more():
                raise self._fault("the file ends here, and what it holds does not")
        self._at = found.start()
        return found[0]

    def entry(self) -> Any:
        """The value that stands here."""
        while True:
            fault: Exception | None = None
            try:
                entry, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                fault = error
            # A number at the end of what was read may go on.
            if (fault or end == len(self._text)) and self._more():
                continue
            if fault:
                raise self._fault(f"not valid JSON, or cut short: {fault}") from fault
            self._at = end
            return entry

    def _more(self) -> bool:
        left = self._text[self._at :]
        if len(left) > _LONGEST_ROW_CHARACTERS:
            return False
        part = self._file.read(max(_CHUNK_CHARACTERS, len(left)))
        self._text, self._at = left + part, 0
        return bool(part)

    def _fault(self, what: str) -> DataError:
        return DataError(
            f"'{self._path}', entry {self._number}: {what};", "write or copy the file again."
        )
