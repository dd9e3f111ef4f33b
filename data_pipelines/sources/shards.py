"""Which file holds which record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Shards(Protocol):
    """Files and where their records end.

    Attributes:
        ends: [S] int64, records up to the end of each file.
    """

    @property
    def ends(self) -> np.ndarray: ...

    def path(self, shard: int) -> str:
        """The file, a local path or a URL."""
        ...

    def index_path(self, shard: int) -> str:
        """The index of a tar."""
        ...


class ShardList:
    """A few files, named one by one."""

    def __init__(self, files: Sequence[tuple[str | os.PathLike, int]], indexes: Sequence[str] = ()):
        """Names the files.

        Args:
            files: (path or URL, number of records).
            indexes: of tars, where they do not lie beside them.
        """
        self._indexes = indexes
        self._paths = [os.fspath(path) for path, _ in files]
        self.ends = np.cumsum([count for _, count in files], dtype=np.int64)

    def path(self, shard: int) -> str:
        """The file, a local path or a URL."""
        return self._paths[shard]

    def index_path(self, shard: int) -> str:
        """The index of a tar."""
        return self._indexes[shard] if self._indexes else self._paths[shard] + ".idx"


def as_shards(shards: Shards | Sequence[tuple[str | os.PathLike, int]]) -> Shards:
    """Takes pairs of (path, records) where shards are wanted.

    Args:
        shards: either.

    Returns:
        The shards.
    """
    return ShardList(shards) if isinstance(shards, Sequence) else shards


def count(ends: np.ndarray) -> int:
    """Records of all files.

    Args:
        ends: [S] int64.

    Returns:
        The last end.
    """
    return int(ends[-1]) if len(ends) else 0


def span(ends: np.ndarray, shard: int) -> int:
    """Records of one file.

    Args:
        ends: [S] int64.
        shard: its number.

    Returns:
        The number of records.
    """
    return int(ends[shard]) - (int(ends[shard - 1]) if shard else 0)


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Finds a record in steps that grow with the logarithm of the number of files.

    Args:
        ends: [S] int64.
        index: record number.

    Returns:
        Its file and its position there.

    Raises:
        IndexError: if there is no such record.
    """
    total = count(ends)
    if not 0 <= index < total:
        raise IndexError(f"Record {index} is outside the {total} records of the source.")
    shard = int(ends.searchsorted(index, "right"))
    return shard, int(index) - (int(ends[shard - 1]) if shard else 0)
