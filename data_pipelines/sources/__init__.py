"""Random access to records: the one thing a data set must offer.

A source has a length and gives a record by its number; it is picklable, may be read by several
threads at once, and the same number always gives the same record.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

Record = TypeVar("Record", covariant=True)


@runtime_checkable
class Source(Protocol[Record]):
    """Records by number, ``0 <= index < len(source)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
