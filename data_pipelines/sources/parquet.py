"""Rows of parquet files, as Hugging Face's sets come.

A row costs the reading of its row group, of which the recently used are kept: under a global
shuffle write groups of about a hundred rows, or convert the set to ArrayRecord.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, Fields, storage
from data_pipelines.sources.lru import Lru
from data_pipelines.sources.shards import Shards, as_shards, count, locate, span

OPEN_FILES = 64
GROUP_BYTES = 1 << 30
"""Memory for row groups; also the most that one of them may have."""


class ParquetSource:
    """The rows of several parquet files, one after another: column -> value.

    A struct of ``bytes`` and ``path``, Hugging Face's picture, becomes its bytes; other structs
    become a field for each member, joined by "/".
    """

    def __init__(
        self,
        shards: Shards | Sequence[tuple[str | os.PathLike, int]],
        *,
        open_files: int = OPEN_FILES,
        group_bytes: int = GROUP_BYTES,
    ):
        """Names the files; none is opened yet.

        Args:
            shards: the files and their numbers of rows, local or URLs.
            open_files: most files held open.
            group_bytes: most memory for row groups.
        """
        self._shards, self._bounds = as_shards(shards), (open_files, group_bytes)
        self._files = Lru(self._open, _close, items=open_files, bytes=1 << 62)
        self._groups = Lru(self._read, lambda table: None, items=1 << 30, bytes=group_bytes)

    def __len__(self) -> int:
        return count(self._shards.ends)

    def __getitem__(self, index: int) -> Fields:
        """Reads a row.

        Args:
            index: its number.

        Returns:
            Column -> value.

        Raises:
            BadShardError: if the file cannot be read or is not the one that was counted.
            FileNotFoundError: if it is missing.
        """
        shard, position = locate(self._shards.ends, index)
        with self._files.lend(shard) as (_, ends, _):
            group = int(ends.searchsorted(position, "right"))
            first = int(ends[group - 1]) if group else 0
        with self._groups.lend((shard, group)) as table:
            try:
                row = table.slice(position - first, 1).to_pylist()[0]
            except (ValueError, UnicodeDecodeError) as error:
                path = self._shards.path(shard)
                raise BadRecordError(
                    "encoding", f"Row {position} of {path} cannot be read: {error}."
                ) from error
        fields: dict[str, Any] = {}
        for name, value in row.items():
            _flatten(fields, name, value)
        return fields

    def _open(self, shard: int) -> tuple[tuple[Any, np.ndarray, threading.Lock], int]:
        path, wanted = self._shards.path(shard), span(self._shards.ends, shard)
        file = open_file(path)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if sum(rows) != wanted:
            file.close(force=True)
            raise BadShardError(
                f"{path} holds {sum(rows)} rows, but {wanted} were counted; index the folder again."
            )
        return (file, np.cumsum(rows, dtype=np.int64), threading.Lock()), 0

    def _read(self, key: tuple[int, int]) -> tuple[Any, int]:
        import pyarrow as pa

        shard, group = key
        path = self._shards.path(shard)
        with self._files.lend(shard) as (file, _, lock), lock:
            size = file.metadata.row_group(group).total_byte_size
            if size > self._bounds[1]:
                raise BadShardError(
                    f"Row group {group} of {path} has {size} bytes; write smaller ones, or convert "
                    "the set with python -m data_pipelines.build convert."
                )
            try:
                table = file.read_row_group(group, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise BadShardError(
                    f"Row group {group} of {path} cannot be read: {error}."
                ) from error
        return table, table.nbytes

    def close(self) -> None:
        """Closes the open files and lets go of the rows; a later read opens them again."""
        self._groups.close()
        self._files.close()

    def __reduce__(self):
        return _make, (self._shards, *self._bounds)


def _make(shards: Shards, open_files: int, group_bytes: int) -> ParquetSource:
    return ParquetSource(shards, open_files=open_files, group_bytes=group_bytes)


def _close(opened: tuple[Any, np.ndarray, threading.Lock]) -> None:
    opened[0].close(force=True)


def _flatten(fields: dict[str, Any], name: str, value: Any) -> None:
    if _is_picture(value):
        fields[name] = value["bytes"]
    elif isinstance(value, dict):
        for key, part in value.items():
            _flatten(fields, f"{name}/{key}", part)
    elif isinstance(value, list) and value and all(map(_is_picture, value)):
        fields[name] = [part["bytes"] for part in value]
    else:
        fields[name] = value


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def open_file(path: str) -> Any:
    """Opens one file.

    Args:
        path: local or a URL.

    Returns:
        Its `pyarrow.parquet.ParquetFile`.

    Raises:
        FileNotFoundError: if it is not there.
        BadShardError: if it is no parquet file or cut off.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remote = storage.is_remote(path)
    try:
        file = pa.PythonFile(storage.SeekableFile(path), mode="r") if remote else path
        return pq.ParquetFile(file, pre_buffer=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The parquet file {path} is missing; fetch it, or index the folder again."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise BadShardError(f"{path} cannot be read as parquet: {error}.") from error
