"""Random access to records: the one thing a data set must offer.

A source has a length and gives a record by its number; it is picklable, may be read by several
threads at once, and the same number always gives the same record.

=============================  ==============================================================
`tar.TarSource`                webdataset tars with an index beside them, as img2dataset writes
`array_record.ArrayRecordSource`  the bytes of ArrayRecord files
`tfds.ExampleSource`           the fields of those bytes where they are `tf.train.Example`
`parquet.ParquetSource`        rows of parquet files
`memory.MemorySource`          a sequence
=============================  ==============================================================

The first four read local files and object stores (`storage`), hold a bounded number of files open
(`lru`) whatever the number of shards, and open again after `close`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from data_pipelines.sample import BadRecordError

Record = TypeVar("Record", covariant=True)

Fields = Mapping[str, Any]
"""A record by field: bytes, str, int, float, a list of these, or None. Of a tar, the members of a
sample by extension, and "__key__"."""


@runtime_checkable
class Source(Protocol[Record]):
    """Records by number, ``0 <= index < len(source)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class BadShardError(BadRecordError):
    """A file that is broken or is not the one that was indexed; its records count as "shard"."""

    def __init__(self, message: str):
        super().__init__("shard", message)

    def __reduce__(self):
        return type(self), (str(self),)
