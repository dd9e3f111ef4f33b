"""Reading annotation files whose layout differs from mirror to mirror.

A list, an object that holds the list under a name, an object of id -> record, JSON lines, and any
of these compressed with gzip, all read as a stream of `Record`: a gigabyte of JSON is never held
whole where its records are top-level or one level down.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
from collections.abc import Generator, Iterator
from typing import Any

from data_pipelines.sample import BadRecordError

CHUNK = 1 << 20  # characters
HELD_OUT = "held-out split"
"""Reason of records that are left out because they are of no training split."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One entry of an annotation file; its methods say which entry lacks what.

    Attributes:
        data: what the file holds, an object if all is well.
        place: file and position, for errors.
    """

    data: Any
    place: str

    def get(self, *names: str) -> Any:
        """The first of some fields that is there and not null.

        Args:
            names: of the field, in other mirrors too.

        Returns:
            Its value.

        Raises:
            BadRecordError: if there is none; the message lists the fields that were found.
        """
        if not isinstance(self.data, dict):
            raise BadRecordError("no object", f"{self.place} is no object but {self.data!r:.60}.")
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        found = ", ".join(map(str, self.data)) or "nothing"
        raise BadRecordError(
            f"missing {names[0]}",
            f"{self.place} has no field {' or '.join(map(repr, names))}; found {found}.",
        )

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return isinstance(self.data, dict) and self.data.get(name) is not None

    def text(self, *names: str) -> str:
        """As `get`; numbers become text (ids are numbers here and strings there)."""
        value = self.get(*names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (str, int, float)):
            raise self._wrong(names, value, "text")
        return str(value).strip()

    def number(self, *names: str) -> float:
        """As `get`, for a number or the text of one."""
        value = self.get(*names)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self._wrong(names, value, "a number") from None

    def integer(self, *names: str) -> int:
        """As `number`, for whole ones."""
        value = self.number(*names)
        if not value.is_integer():
            raise self._wrong(names, value, "a whole number")
        return int(value)

    def list(self, *names: str) -> list[Any]:
        """As `get`, for lists; text that holds a JSON list (as in CSV mirrors) is read."""
        value = self.get(*names)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, list):
            raise self._wrong(names, value, "a list")
        return value

    def numbers(self, count: int, *names: str) -> list[float]:
        """As `list`, for so many numbers."""
        values = self.list(*names)
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count:
            raise self._wrong(names, values, f"{count} numbers")
        return numbers

    def children(self, *names: str) -> Iterator[Record]:
        """The records that a list field holds."""
        for i, value in enumerate(self.list(*names)):
            yield Record(value, f"{self.place}, {names[0]} {i}")

    def training(self, *names: str, splits: tuple[str, ...] = ("train",)) -> None:
        """Refuses the record if a field says that it is of another split.

        Args:
            names: of the field; without it the record passes.
            splits: that are trained on.

        Raises:
            BadRecordError: with the reason `HELD_OUT`.
        """
        for name in names:
            if self.has(name) and self.text(name) not in splits:
                raise BadRecordError(HELD_OUT, f"{self.place} is of the split {self.text(name)}.")

    def _wrong(self, names: tuple[str, ...], value: object, wanted: str) -> BadRecordError:
        return BadRecordError(
            f"wrong {names[0]}", f"{self.place} has {names[0]!r} = {value!r:.60}, not {wanted}."
        )


class Annotations:
    """The annotation files of one set, and what could not be used of them.

    Args:
        name: of the set.
        folder: where its files lie.
        square: whether pictures will be padded to squares; see `boxes`.
    """

    def __init__(self, name: str, folder: str | pathlib.Path, *, square: bool = True):
        self.name, self.folder, self.square = name, pathlib.Path(folder), square
        self.skipped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self.files: dict[pathlib.Path, None] = {}  # what was read, in order

    def find(self, *patterns: str) -> pathlib.Path:
        """The one file that fits the first fitting pattern.

        Args:
            patterns: of its name or path in the folder, the official one first.

        Returns:
            Its path.

        Raises:
            FileNotFoundError: if none fits.
            ValueError: if several fit.
        """
        found = self.find_all(*patterns)
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise ValueError(
                f"{self.folder} holds {len(found)} files that fit {patterns[0]} ({names}); "
                "keep one."
            )
        return found[0]

    def find_all(self, *patterns: str, optional: bool = False) -> list[pathlib.Path]:
        """As `find`, for any number of files: those that fit the first pattern that fits any.

        Args:
            patterns: as for `find`; looked for in the folder and one level below.
            optional: whether there may be none.

        Returns:
            Their paths, sorted.

        Raises:
            FileNotFoundError: if none fits and it is not optional.
        """
        for pattern in patterns:
            for prefix in ("", "*/"):
                found = sorted(p for p in self.folder.glob(prefix + pattern) if p.is_file())
                if found:
                    self.files.update(dict.fromkeys(found))
                    return found
        if optional:
            return []
        raise FileNotFoundError(
            f"{self.name} needs {' or '.join(patterns)} in {self.folder}, which is not there; "
            "put the file there or name its folder."
        )

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Counts a bad record by its reason and goes on; the first of each reason is kept."""
        try:
            yield
        except BadRecordError as error:
            self.skip(error.reason, str(error))

    def skip(self, reason: str, message: str) -> None:
        """Counts a record that is left out."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)


def records(path: pathlib.Path, *lists: str, key: str = "") -> Iterator[Record]:
    """The records of a JSON file.

    Args:
        path: ``.json``, ``.jsonl``, either with ``.gz``.
        lists: names under which an object keeps the list of records.
        key: where an object may be id -> record: the field that the id becomes.

    Yields:
        The records in the order of the file.

    Raises:
        ValueError: if the file is damaged or is an object with none of these.
    """
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    if not lines:
        with opened(path) as file:
            try:
                lines = yield from _top_level(_Stream(file, path), lists, key, path.name)
            except EOFError:
                raise ValueError(f"{path} ends in the middle; fetch it again.") from None
    if lines:
        with opened(path) as file:
            for i, line in enumerate(file):
                if line.strip():
                    yield Record(_parsed(line), f"{path.name}, line {i + 1}")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line  # a record that is no object: counted, not fatal


def _top_level(
    stream: _Stream, lists: tuple[str, ...], key: str, name: str
) -> Generator[Record, None, bool]:
    # Returns whether the file is JSON lines under another name.
    if stream.peek() == "[":
        for i, data in enumerate(stream.elements()):
            yield Record(data, f"{name}, record {i}")
        return False
    found, others = False, []
    for field in stream.fields():
        if field in lists and stream.peek() == "[":
            found = True
            for i, data in enumerate(stream.elements()):
                yield Record(data, f"{name}, {field} {i}")
            continue
        value = stream.value()
        if key and isinstance(value, dict):
            found = True
            yield Record({key: field, **value}, f"{name}, record {field!r}")
        else:
            others.append(field)
    if found:
        return False
    if stream.peek():
        return True
    wanted = f", or one under {' or '.join(map(repr, lists))}" if lists else ""
    raise ValueError(
        f"{stream.path} is an object with the entries {', '.join(others) or 'none'}; expected a "
        f"list of records{wanted}."
    )


class _Stream:
    """Values of a JSON text one by one, reading on as they need."""

    def __init__(self, file: io.TextIOWrapper, path: pathlib.Path):
        self.file, self.path = file, path
        self.buffer, self.at, self.ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in " \t\r\n":
                    return self.buffer[self.at]
                self.at += 1
            if not self._more(CHUNK):
                return ""

    def take(self, wanted: str) -> str:
        character = self.peek()
        if not character:
            raise EOFError
        if character not in wanted:
            raise ValueError(f"{self.path} is no JSON: found {character!r} instead of {wanted!r}.")
        self.at += 1
        return character

    def value(self) -> Any:
        if not self.peek():
            raise EOFError
        amount = CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer, self.at)
                # A number may go on in the next chunk.
                if end < len(self.buffer) or self.ended:
                    self.at = end
                    return value
            except ValueError as error:
                if self.ended:
                    if getattr(error, "pos", 0) >= len(self.buffer) - 1:
                        raise EOFError from None
                    raise ValueError(f"{self.path} is no JSON: {error}.") from None
            # Doubling keeps the cost of starting a long value again linear.
            self._more(amount)
            amount *= 2

    def elements(self) -> Iterator[Any]:
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def fields(self) -> Iterator[str]:
        """Names of an object's fields; the caller takes each value before the next."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def _more(self, amount: int) -> bool:
        text = self.file.read(amount)
        self.ended = not text
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(text)


def opened(path: pathlib.Path, newline: str | None = None) -> io.TextIOWrapper:
    """Opens a text file that may be compressed.

    Args:
        path: plain or gzip, told by content (mirrors rename files).
        newline: as for `open`.

    Returns:
        UTF-8 text without its byte order mark; bytes that are none become U+FFFD.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    content: Any = gzip.open(path) if packed else open(path, "rb")  # noqa: SIM115
    return io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace", newline=newline)
