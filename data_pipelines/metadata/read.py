"""A source's file as record batches of the one schema, streamed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from data_pipelines.metadata.columns import cast, from_tag
from data_pipelines.metadata.kernels import pc
from data_pipelines.metadata.keys import make_uids
from data_pipelines.metadata.layouts import LAYOUTS, Layout
from data_pipelines.metadata.schema import SCHEMA

ROWS = 65536
"""Rows of a batch at most: its columns then fit a core's cache."""
_BLOCK = 8 << 20  # bytes of text parsed at a time


class MetadataError(ValueError):
    """A file that cannot be read as the source it is said to be."""


def read(
    path: str,
    source: str,
    fields: Sequence[str] | None = None,
    *,
    keep: np.ndarray | None = None,
    name: str = "",
    malformed: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """Reads one file.

    Args:
        path: a parquet, CSV, TSV, JSON or JSON-lines file (the last four also with ".gz"), local
            or of any file system that fsspec knows.
        source: a key of `LAYOUTS`.
        fields: those of `SCHEMA` that are wanted, all by default.
        keep: which of the file's rows are wanted, [rows] bool; all by default.
        name: what the column "source" says, if not `source`.
        malformed: called for every line that has another number of fields than its table.

    Yields:
        Record batches of at most `ROWS` rows, in the order of the file; a field that the source
        does not have is null.

    Raises:
        MetadataError: if the source is unknown, or the file lacks a column, cannot be read or has
            another number of rows than `keep`.
    """
    if source not in LAYOUTS:
        raise MetadataError(f"No source is called {source!r}: use one of {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[source]
    schema = SCHEMA if fields is None else pa.schema([SCHEMA.field(f) for f in fields])
    opener = _opener(path)
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            names, batches = opener(file, layout, malformed)
            found = _columns(layout, schema.names, names, path)
            row = 0
            for batch in batches(sorted({c for c in found.values() if c})):
                for start in range(0, batch.num_rows, ROWS):
                    part = batch.slice(start, ROWS)
                    wanted = None if keep is None else keep[row : row + part.num_rows]
                    row += part.num_rows
                    if wanted is not None and len(wanted) == part.num_rows:
                        part = part.filter(pa.array(wanted))
                    yield _convert(part, layout, found, schema, name or source)
            if keep is not None and row != len(keep):
                raise MetadataError(
                    f"{path} had {len(keep)} rows when it was scanned and has {row} now: remove "
                    "the output folder and begin anew."
                )
    except (pa.ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
        cause = str(error).splitlines()[0]
        raise MetadataError(f"{path} cannot be read as {source}: {cause}") from error


def _opener(path: str) -> Callable:
    stem = path.removesuffix(".gz")
    for ending, opener in _OPENERS.items():
        if stem.endswith(ending):
            return opener
    raise MetadataError(f"{path} ends in none of {', '.join(_OPENERS)}: rename or convert it.")


def _columns(
    layout: Layout, fields: Sequence[str], names: Sequence[str], path: str
) -> dict[str, str]:
    """Field -> the file's column, "" where it has none."""
    lower = {name.lower(): name for name in reversed(names)}
    found = {}
    wanted = dict.fromkeys([*fields, "url", "caption"])  # these two must always be there
    for field in wanted:
        candidates = layout.columns.get(field, ())
        same = [c for c in candidates if c in names]
        near = [lower[c.lower()] for c in candidates if c.lower() in lower]
        found[field] = (same or near or [""])[0]
        if field in ("url", "caption") and not found[field]:
            raise MetadataError(
                f"{path} has no column {' or '.join(candidates)} for the {field}; "
                f"its columns are {', '.join(names) or 'none'}."
            )
    if "punsafe" in wanted and not found["punsafe"] and layout.nsfw_tag in names:
        found["nsfw_tag"] = layout.nsfw_tag
    if "uid" not in wanted:  # which is made of both
        found = {f: c for f, c in found.items() if f in fields or f == "nsfw_tag"}
    if not any(found.values()):
        found["url"] = next(c for c in names if c.lower() in map(str.lower, layout.columns["url"]))
    return found


def _convert(batch: Any, layout: Layout, found: dict[str, str], schema: Any, name: str) -> Any:
    rows = batch.num_rows
    made: dict[str, Any] = {}
    for field in {*schema.names, *(("url", "caption") if "uid" in schema.names else ())}:
        kind = SCHEMA.field(field).type
        if column := found.get(field):
            made[field] = cast(batch.column(column), field, kind)
        elif field == "punsafe" and "nsfw_tag" in found:
            made[field] = from_tag(batch.column(found["nsfw_tag"]))
        elif field == "source":
            indices = pa.repeat(pa.scalar(0, pa.int32()), rows)
            made[field] = pa.DictionaryArray.from_arrays(indices, pa.array([name]))
        elif field == "lang" and layout.lang:
            made[field] = pa.repeat(layout.lang, rows)
        elif field != "uid":
            made[field] = pa.nulls(rows, kind)
    if "uid" in schema.names:
        uids = make_uids(made["url"], made["caption"])
        made["uid"] = pc.coalesce(made["uid"], uids) if "uid" in made else uids
    return pa.RecordBatch.from_arrays([made[f] for f in schema.names], schema=schema)


# Every opener: (file, layout, malformed) -> (its columns, columns wanted -> batches).


def _parquet(file: Any, layout: Layout, malformed: Callable) -> tuple[list[str], Callable]:
    table = pyarrow.parquet.ParquetFile(file)

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        yield from table.iter_batches(ROWS, columns=list(columns), use_threads=False)

    return table.schema_arrow.names, batches


def _text_table(delimiter: str) -> Callable:
    def opener(file: Any, layout: Layout, malformed: Callable) -> tuple[list[str], Callable]:
        def skip(row: Any) -> str:
            malformed()
            return "skip"

        names = list(layout.header)
        if not names:
            line = file.readline().decode("utf-8-sig")
            first = pyarrow.csv.read_csv(
                pa.BufferReader(line.encode()),
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            )
            names = first.column_names

        def batches(columns: Sequence[str]) -> Iterator[Any]:
            if not file.read(1):
                return
            file.seek(-1, 1)
            reader = pyarrow.csv.open_csv(
                pa.PythonFile(file, "r"),
                read_options=pyarrow.csv.ReadOptions(
                    column_names=names, block_size=_BLOCK, use_threads=False
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if layout.quoted else False,
                    newlines_in_values=layout.quoted,
                    invalid_row_handler=skip,
                ),
                # As bytes: one caption that is not UTF-8 must not end the file.
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={c: pa.binary() for c in names},
                    include_columns=list(columns),
                    strings_can_be_null=False,
                ),
            )
            yield from reader

        return names, batches

    return opener


def _json(file: Any, layout: Layout, malformed: Callable) -> tuple[list[str], Callable]:
    """One object of parallel lists, or one list of objects."""
    value = json.load(file)
    if isinstance(value, list):
        names = list(dict.fromkeys(key for row in value for key in row))
        value = {name: [row.get(name) for row in value] for name in names}
    lists = {name: column for name, column in value.items() if isinstance(column, list)}
    if len({len(column) for column in lists.values()}) > 1:
        counts = ", ".join(f"{name} has {len(column)}" for name, column in lists.items())
        raise pa.ArrowInvalid(f"its lists differ in length: {counts}.")

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        count = len(next(iter(lists.values()), ()))
        for start in range(0, count, ROWS):
            parts = {c: lists[c][start : start + ROWS] for c in columns}
            arrays = [pa.array(part) for part in parts.values()]
            yield pa.RecordBatch.from_arrays(arrays, names=list(parts))

    return list(lists), batches


def _json_lines(file: Any, layout: Layout, malformed: Callable) -> tuple[list[str], Callable]:
    reader = pyarrow.json.open_json(
        pa.PythonFile(file, "r"), pyarrow.json.ReadOptions(use_threads=False, block_size=_BLOCK)
    )

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        for batch in reader:
            yield batch.select(list(columns))

    return reader.schema.names, batches


_OPENERS: dict[str, Callable] = {
    ".parquet": _parquet,
    ".csv": _text_table(","),
    ".tsv": _text_table("\t"),
    ".txt": _text_table("\t"),
    ".jsonl": _json_lines,
    ".json": _json,
}


def expand(patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Files that match any of some patterns.

    Args:
        patterns: paths with "*", local or of any file system that fsspec knows.

    Returns:
        (path, size in bytes), ordered by path, each once.
    """
    found: dict[str, int] = {}
    for pattern in patterns:
        with contextlib.suppress(FileNotFoundError):
            file_system, path = fsspec.core.url_to_fs(pattern)
            for match in file_system.glob(path) if "*" in path else [path]:
                found[file_system.unstrip_protocol(match)] = file_system.size(match) or 0
    return sorted((path.removeprefix("file://"), size) for path, size in found.items())
