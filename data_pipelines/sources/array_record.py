"""Records of ArrayRecord files."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, storage
from data_pipelines.sources.lru import Lru
from data_pipelines.sources.shards import Shards, as_shards, count, locate, span

OPEN_FILES = 64
"""Every open file keeps its index in memory, 10-30 bytes per record."""
FETCHED_BYTES = 16 << 30
"""Disk for shards that were fetched from an object store."""
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordSource:
    """The records of several ArrayRecord files, one after another.

    Reads ``read(p, p + 1)``: the stock source's ``read([p])`` costs time in proportion to the
    records of the file (google/array_record#143), and never closes a file. The library reads local
    files only, so a shard of an object store is fetched whole when first read and given up again
    when `FETCHED_BYTES` are full: good for sets that fit there and for reading shard by shard; a
    set that is shuffled as a whole out of an object store is better kept as tars or parquet.
    """

    def __init__(
        self,
        shards: Shards | Sequence[tuple[str | os.PathLike, int]],
        *,
        open_files: int = OPEN_FILES,
        fetched_bytes: int = FETCHED_BYTES,
    ):
        """Names the files; none is opened yet.

        Args:
            shards: the files and their numbers of records, local or URLs.
            open_files: most files held open.
            fetched_bytes: most bytes of fetched files held on disk.
        """
        self._shards = as_shards(shards)
        self._bounds = (open_files, fetched_bytes)
        self._readers: Lru[Any] = Lru(self._open, _close, items=open_files, bytes=fetched_bytes)

    def __len__(self) -> int:
        return count(self._shards.ends)

    def __getitem__(self, index: int) -> bytes:
        shard, position = locate(self._shards.ends, index)
        with self._readers.lend(shard) as (reader, lock), lock:
            # One reader serves one read at a time.
            try:
                return reader.read(position, position + 1)[0]
            except (RuntimeError, IndexError, ValueError) as error:
                path = self._shards.path(shard)
                raise BadRecordError(
                    "broken", f"Record {position} of {path} cannot be read: {error}."
                ) from error

    def _open(self, shard: int) -> tuple[Any, int]:
        path, wanted = self._shards.path(shard), span(self._shards.ends, shard)
        reader, fetched = open_reader(path)
        found = reader.num_records()
        if found != wanted:
            reader.close()
            raise BadShardError(
                f"{path} holds {found} records, but {wanted} were counted when it was built; "
                "build the data set again."
            )
        return (reader, threading.Lock()), fetched

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        self._readers.close()

    def __reduce__(self):
        return _make, (self._shards, *self._bounds)


def _make(shards: Shards, open_files: int, fetched_bytes: int) -> ArrayRecordSource:
    return ArrayRecordSource(shards, open_files=open_files, fetched_bytes=fetched_bytes)


def _close(opened: tuple[Any, threading.Lock]) -> None:
    opened[0].close()


def open_reader(path: str) -> tuple[Any, int]:
    """Opens one file.

    Args:
        path: local or a URL, which is fetched.

    Returns:
        The reader, and the bytes of disk that it holds on to until it is closed.

    Raises:
        FileNotFoundError: if it is not there.
        BadShardError: if it is no ArrayRecord file or cut off.
    """
    from array_record.python.array_record_module import ArrayRecordReader as Reader

    if not storage.is_remote(path):
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"The record file {path} is missing; build the data set again with "
                "python -m data_pipelines.build."
            )
        return _checked(Reader, path, path), 0
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        local = os.path.join(folder, "fetched")
        size = fetch(path, local)
        # Once open it needs no name: its space is free again when it is closed, come what may.
        return _checked(Reader, local, path), size


def _checked(make: Any, local: str, path: str) -> Any:
    try:
        reader = make(local, _OPTIONS)
        if reader.ok():
            return reader
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise BadShardError(f"{path} cannot be read as ArrayRecord: {error}.") from error
    raise BadShardError(f"{path} cannot be read as ArrayRecord; build the data set again.")


def fetch(url: str, local: str, piece: int = 64 << 20) -> int:
    """Copies a file of an object store, piece by piece.

    Args:
        url: of the file.
        local: where to write.
        piece: bytes at a time.

    Returns:
        Its bytes.

    Raises:
        OSError: if the disk has no room for it.
    """
    file = storage.RangedFile(url)
    room = shutil.disk_usage(os.path.dirname(local)).free
    if file.size > room:
        raise OSError(
            f"{url} has {file.size} bytes, the disk of {local} has {room} left; free some, or set "
            "TMPDIR to a larger disk."
        )
    with open(local, "wb") as out:
        for start in range(0, file.size, piece):
            out.write(file.read(start, min(start + piece, file.size)))
    return file.size
