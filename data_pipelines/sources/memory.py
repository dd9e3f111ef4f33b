"""Records held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Record = TypeVar("Record")


class MemorySource(Generic[Record]):
    """A source over a sequence, for small generated sets and tests."""

    def __init__(self, records: Sequence[Record]):
        """Holds the records.

        Args:
            records: any sequence.
        """
        self._records = tuple(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]
