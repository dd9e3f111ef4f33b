"""Tables of pictures and texts as people have them: CSV, TSV, JSON, JSONL, parquet."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.fields import FieldNames, Kind, to_sample
from data_pipelines.sample import BadRecordError, Sample

COLUMNS = {
    "image": ("image", "images", "image_path", "file", "file_name", "filename", "path", "filepath"),
    "caption": ("caption", "captions", "text", "title", "TEXT", "txt"),
    "language": ("language", "lang", "LANGUAGE"),
    "key": ("key", "id", "uid", "SAMPLE_ID"),
    "conversations": ("conversations",),
}
"""The names by which columns are found where none is given."""
STANDARD = FieldNames(**{role: (role,) for role in COLUMNS})
MAX_PICTURE = 256 << 20
"""Bytes of a picture file beyond which it is refused."""
MAX_CELL = 16 << 20

Row = tuple[int, Mapping[str, Any] | str]
"""Number of the row, and role -> value, or what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose columns are known.

    Attributes:
        path: of the file.
        images: folder of the picture files; "" where the table holds the pictures.
        columns: role -> column.
        language: of all captions, where there is no column.
        kind: "conversations" where there is such a column, else "pairs".
    """

    path: str
    images: str
    columns: Mapping[str, str]
    language: str
    kind: Kind

    def settings(self) -> dict[str, Any]:
        """What a conversion depends on."""
        found = os.stat(self.path)
        version = [found.st_size, found.st_mtime_ns]
        return {
            "table": [os.path.abspath(self.path), *version],
            "images": self.images,
            "columns": dict(self.columns),
            "language": self.language,
        }

    def chunks(self, size: int) -> Iterator[tuple[float, list[Row]]]:
        """The rows, a number of them at a time.

        Args:
            size: most rows of a chunk.

        Yields:
            Share of the table up to the end of the chunk, and the rows.
        """
        rows = read_rows(self.path)
        number = 0
        while chunk := list(itertools.islice(rows, size)):
            out: list[Row] = []
            for _, row in chunk:
                wanted = (
                    row
                    if isinstance(row, str)
                    else {role: row.get(column) for role, column in self.columns.items()}
                )
                out.append((number, wanted))
                number += 1
            yield chunk[-1][0], out

    def samples(self, chunk: list[Row]) -> Iterator[tuple[int, str, Sample | BadRecordError]]:
        """Reads the pictures of some rows.

        Args:
            chunk: the rows.

        Yields:
            Number of the row, what it calls its picture, and its sample or what is wrong with it.
        """
        for number, row in chunk:
            name = ""
            try:
                if isinstance(row, str):
                    raise BadRecordError("broken row", row)
                name = str(row.get("image") or "")[:200] if _is_name(row.get("image")) else ""
                fields = {**row, "image": self._pictures(row.get("image"), number)}
                fields["language"] = row.get("language") or self.language
                if fields.get("key") is None:
                    fields["key"] = name or number
                yield number, name, to_sample(fields, STANDARD, self.kind, number)
            except BadRecordError as error:
                yield number, name, error

    def _pictures(self, value: Any, number: int) -> list[bytes] | None:
        if value is None or value == "" or value == []:
            return None
        if isinstance(value, str) and value.startswith("["):  # a list in a cell
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        return [
            self._picture(part, number) for part in (value if isinstance(value, list) else [value])
        ]

    def _picture(self, value: Any, number: int) -> bytes:
        if isinstance(value, dict):  # as Hugging Face writes them
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise BadRecordError("missing image", f"Row {number} names no picture.")
        root = os.path.abspath(self.images)
        path = os.path.normpath(os.path.join(root, value))
        if not path.startswith(os.path.join(root, "")):
            raise BadRecordError("outside folder", f"{value!r} is not inside {self.images}.")
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_PICTURE:
                    raise BadRecordError("too large", f"{path} has more than {MAX_PICTURE} bytes.")
                return file.read()
        except (OSError, ValueError) as error:
            raise BadRecordError("missing image", f"{path} cannot be read: {error}.") from error


def _is_name(value: Any) -> bool:
    return isinstance(value, str | list) and not (
        isinstance(value, list) and any(not isinstance(part, str) for part in value)
    )


def open_table(path: str, images: str, given: Mapping[str, str], language: str = "") -> Table:
    """Finds the columns of a table.

    Args:
        path: .csv, .tsv, .json (a list), .jsonl or .parquet.
        images: folder of the picture files.
        given: role -> column; the other roles are found by their usual names.
        language: of all captions, where there is no column.

    Returns:
        The table.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a column is missing or the file is none of these.
    """
    seen = columns_of(path)
    columns = {}
    for role, known in COLUMNS.items():
        column = given.get(role) or next((name for name in known if name in seen), None)
        if column is not None and column not in seen:
            raise ValueError(
                f"{path} has no column {column!r} for the {role}; it has {', '.join(seen)}."
            )
        if column is not None:
            columns[role] = column
    conversations = "conversations" in columns and "caption" not in given
    kind: Kind = "conversations" if conversations else "pairs"
    for role in () if conversations else ("image", "caption"):
        if role not in columns:
            raise ValueError(
                f"{path} has no column for the {role}; name it with --{role}. It has "
                f"{', '.join(seen) or 'no columns'}."
            )
    return Table(path, images, columns, "" if "language" in columns else language, kind)


def columns_of(path: str) -> list[str]:
    """The columns of a table; of JSON, those of the first hundred rows.

    Args:
        path: of the file.

    Returns:
        Their names.

    Raises:
        ValueError: if the file is of another kind, or has no line of columns.
    """
    if path.endswith(".parquet"):
        from data_pipelines.sources.parquet import open_file

        file = open_file(path)
        names = file.schema_arrow.names
        file.close(force=True)
        return list(names)
    if path.endswith((".csv", ".tsv")):
        csv.field_size_limit(MAX_CELL)
        try:
            with _text(path) as file:
                return list(next(csv.reader(file, delimiter=_delimiter(path)), []))
        except csv.Error as error:
            raise ValueError(f"The first line of {path} holds no columns: {error}.") from error
    seen: dict[str, None] = {}
    for _, row in itertools.islice(read_rows(path), 100):
        seen.update(dict.fromkeys(row) if isinstance(row, Mapping) else {})
    return list(seen)


def read_rows(path: str) -> Iterator[tuple[float, Mapping[str, Any] | str]]:
    """The rows of a table, one after another.

    Args:
        path: of the file.

    Yields:
        Share of the file up to the row, and column -> value, or what is wrong with the row.

    Raises:
        ValueError: if the file is of another kind.
    """
    if path.endswith(".parquet"):
        from data_pipelines.sources.parquet import open_file

        file = open_file(path)
        total, done = max(file.metadata.num_rows, 1), 0
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            for row in batch.to_pylist():
                done += 1
                yield done / total, row
        file.close(force=True)
    elif path.endswith((".csv", ".tsv")):
        csv.field_size_limit(MAX_CELL)
        with _text(path) as file:
            reader = csv.DictReader(file, delimiter=_delimiter(path))
            yield from _shares(path, file, (_cells(row, reader) for row in _each(reader)))
    elif path.endswith((".jsonl", ".ndjson")):
        with _text(path) as file:
            yield from _shares(path, file, (_object(line) for line in file if line.strip()))
    elif path.endswith(".json"):
        with _text(path) as file:
            try:
                rows = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}.") from error
        if not isinstance(rows, list):
            found = f"an object of {', '.join(rows)}" if isinstance(rows, dict) else "a value"
            raise ValueError(f"{path} holds {found}; a list of objects is wanted.")
        for done, row in enumerate(rows, 1):
            yield done / len(rows), row if isinstance(row, dict) else "It is no object."
    else:
        raise ValueError(f"{path} is none of .csv, .tsv, .json, .jsonl, .parquet.")


def _text(path: str) -> io.TextIOWrapper:
    # Bytes that are no UTF-8 get through, to be counted with the row that has them.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _delimiter(path: str) -> str:
    return "\t" if path.endswith(".tsv") else ","


def _each(reader: csv.DictReader) -> Iterator[Mapping[str, Any] | str]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{error}."


def _cells(row: Mapping[str, Any] | str, reader: csv.DictReader) -> Mapping[str, Any] | str:
    if isinstance(row, Mapping) and (None in row or None in row.values()):
        cells = sum(cell is not None for name, cell in row.items() if name is not None)
        cells += len(row.get(None, ()))  # pyright: ignore[reportArgumentType,reportCallIssue]
        return f"It has {cells} cells, the header has {len(reader.fieldnames or ())}."
    return row


def _object(line: str) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"It is no JSON: {error}."
    return row if isinstance(row, dict) else "It is no object."


def _shares(
    path: str, file: io.TextIOWrapper, rows: Iterable[Mapping[str, Any] | str]
) -> Iterator[tuple[float, Mapping[str, Any] | str]]:
    size = max(os.path.getsize(path), 1)
    for row in rows:
        yield os.lseek(file.fileno(), 0, os.SEEK_CUR) / size, row
