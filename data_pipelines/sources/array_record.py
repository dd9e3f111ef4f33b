"""Records of ArrayRecord files."""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any


class ArrayRecordSource:
    """The records of several ArrayRecord files, one after another.

    Reads ``read(p, p + 1)``: the stock source's ``read([p])`` costs time in proportion to the
    records of the file (google/array_record#143). Files are opened when first read.
    """

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int]]):
        """Names the files.

        Args:
            files: (path, number of records); counts spare opening every file at the start.
        """
        self._files = tuple((os.fspath(path), int(count)) for path, count in files)
        self._start_lock()

    def _start_lock(self) -> None:
        self._ends = tuple(itertools.accumulate(count for _, count in self._files))
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"Record {index} is outside the {len(self)} records of the source.")
        file = bisect.bisect_right(self._ends, index)
        position = int(index) - (self._ends[file - 1] if file else 0)
        # One reader serves one read at a time; what is read here is small and cached above.
        with self._lock:
            return self._reader(file).read(position, position + 1)[0]

    def _reader(self, file: int) -> Any:
        if file not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader as Reader

            path, count = self._files[file]
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"The record file {path} is missing; build the data set again with "
                    "python -m data_pipelines.build."
                )
            reader = Reader(path)
            if reader.num_records() != count:
                raise ValueError(
                    f"{path} holds {reader.num_records()} records, but {count} were counted when "
                    "it was built; build the data set again."
                )
            self._readers[file] = reader
        return self._readers[file]

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def __getstate__(self):
        return self._files

    def __setstate__(self, files):
        self._files = files
        self._start_lock()
