"""What a prepared folder holds: ``manifest.json``, and ``shards.arrow``, its table of files.

The table is mapped into memory, never read as a whole: opening a set of 500,000 files costs what
opening one of ten does, and a record is found by bisection. Its columns are path (relative to the
root, with "/"), end (int64, records up to the end of the file), bytes (int64) and digest (32
bytes).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_pipelines.fields import FieldNames, Kind, to_sample
from data_pipelines.sample import Sample
from data_pipelines.sources import Fields, Source, storage

MANIFEST = "manifest.json"
TABLE = "shards.arrow"
VERSION = 1
FORMATS = ("tar", "array_record", "parquet")
KINDS = ("pairs", "conversations")
DIGESTS = ("ends", "full")
EDGE = 64 << 10


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a set.

    Attributes:
        path: relative to the root, with "/".
        records: in it.
        bytes: its size.
        digest: 32 bytes, see `digest_of`.
    """

    path: str
    records: int
    bytes: int
    digest: bytes


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        kind: "pairs" or "conversations".
        format: "tar", "array_record" (of `tf.train.Example`) or "parquet".
        fields: which field is what.
        records: in all files.
        bytes: of all files.
        shards: number of files.
        table_sha256: of ``shards.arrow``.
        table_bytes: of ``shards.arrow``.
        root: what paths are relative to, itself relative to the folder of the manifest.
        digest: what the files' digests cover, see `digest_of`.
    """

    kind: Kind
    format: str
    fields: FieldNames
    records: int
    bytes: int
    shards: int
    table_sha256: str
    table_bytes: int
    root: str = "."
    digest: str = "ends"


class ShardTable:
    """The mapped table of files; pickled as the place where it lies."""

    def __init__(self, folder: str, root: str = "."):
        """Maps the table.

        Args:
            folder: of the manifest, local or a URL (then the table is fetched into memory).
            root: of the paths, relative to the folder.

        Raises:
            FileNotFoundError: if it is missing.
            ValueError: if it is damaged.
        """
        import pyarrow as pa

        self._place, self._root = (folder, root), storage.join(folder, root)
        self._folder = folder
        path = storage.join(folder, TABLE)
        try:
            remote = storage.is_remote(path)
            file = pa.BufferReader(storage.read(path)) if remote else pa.memory_map(path)
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != 1:
                raise ValueError(f"it has {reader.num_record_batches} batches instead of one")
            batch = reader.get_batch(0)
            if batch.schema != _schema():
                raise ValueError(f"its columns are {', '.join(batch.schema.names)}")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing; index the folder again.") from error
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); index the folder again.") from error
        self._batch = batch
        self.ends: np.ndarray = batch.column("end").to_numpy(zero_copy_only=True)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, shard: int) -> str:
        """The file, a local path or a URL."""
        return storage.join(self._root, self._batch.column("path")[shard].as_py())

    def index_path(self, shard: int) -> str:
        """The index of a tar: it lies under the folder of the manifest."""
        return storage.join(self._folder, self._batch.column("path")[shard].as_py() + ".idx")

    def shard(self, shard: int) -> Shard:
        """All that is known of a file.

        Args:
            shard: its number.

        Returns:
            The row of the table.
        """
        row = {
            name: self._batch.column(name)[shard].as_py() for name in ("path", "bytes", "digest")
        }
        start = int(self.ends[shard - 1]) if shard else 0
        return Shard(records=int(self.ends[shard]) - start, **row)

    def __reduce__(self):
        return ShardTable, self._place


def _schema() -> Any:
    import pyarrow as pa

    columns = [("path", pa.string()), ("end", pa.int64()), ("bytes", pa.int64())]
    return pa.schema([*columns, ("digest", pa.binary(32))])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A set of pictures with captions, or of conversations, by record number.

    Attributes:
        folder: of its manifest.
        manifest: what that says.
        shards: the table of files.
        source: fields by record number.
    """

    folder: str
    manifest: Manifest
    shards: ShardTable
    source: Source[Fields]

    @property
    def kind(self) -> Kind:
        """ "pairs" or "conversations"."""
        return self.manifest.kind

    @property
    def ends(self) -> np.ndarray:
        """[S] int64, records up to the end of each file."""
        return self.shards.ends

    @property
    def digest(self) -> str:
        """Names the content: the same wherever the files lie."""
        return hashlib.sha256(_pack(dataclasses.replace(self.manifest, root="."))).hexdigest()

    def __len__(self) -> int:
        return self.manifest.records

    def sample(self, index: int) -> Sample:
        """Reads a record.

        Args:
            index: its number, ``0 <= index < len(corpus)``.

        Returns:
            The sample.

        Raises:
            BadRecordError: if it cannot be used; "shard" if its file cannot.
            FileNotFoundError: if its file is missing.
        """
        return to_sample(self.source[index], self.manifest.fields, self.kind, index)

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def open_corpus(folder: str | os.PathLike) -> Corpus:
    """Opens a folder that `data_pipelines.build` has indexed or written.

    Args:
        folder: local or a URL.

    Returns:
        The set; files are opened when first read.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if it is damaged or of another version.
    """
    folder = os.fspath(folder)
    manifest = read_manifest(folder)
    shards = ShardTable(folder, manifest.root)
    counted = int(shards.ends[-1]) if len(shards) else 0
    if (len(shards), counted) != (manifest.shards, manifest.records):
        raise ValueError(
            f"{folder}: {TABLE} has {len(shards)} files with {counted} records, {MANIFEST} "
            f"{manifest.shards} with {manifest.records}; index the folder again."
        )
    return Corpus(folder, manifest, shards, make_source(manifest.format, shards))


def make_source(format: str, shards: Any) -> Source[Fields]:
    """The source of a format.

    Args:
        format: one of `FORMATS`.
        shards: the files.

    Returns:
        Fields by record number.
    """
    if format == "tar":
        from data_pipelines.sources.tar import TarSource

        return TarSource(shards)
    if format == "parquet":
        from data_pipelines.sources.parquet import ParquetSource

        return ParquetSource(shards)
    from data_pipelines.sources.array_record import ArrayRecordSource
    from data_pipelines.sources.tfds import ExampleSource

    return ExampleSource(ArrayRecordSource(shards))


def read_manifest(folder: str) -> Manifest:
    """Reads ``manifest.json``.

    Args:
        folder: local or a URL.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or of another version.
    """
    path = storage.join(folder, MANIFEST)
    try:
        content = json.loads(storage.read(path))
        version = content.pop("version")
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version!r}, this code reads {VERSION}; index the "
                "folder again."
            )
        if content["format"] not in FORMATS or content["kind"] not in KINDS:
            raise ValueError(
                f"{path} names the format {content['format']!r} and the kind {content['kind']!r}; "
                "index the folder again."
            )
        manifest = Manifest(**{**content, "fields": _field_names(content["fields"])})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}; run python -m data_pipelines.build index {folder}."
        ) from error
    except (TypeError, KeyError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); index the folder again.") from error
    return manifest


def _field_names(content: dict[str, Any]) -> FieldNames:
    for role, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"fields.{role} is {names!r}, no list of names")
    return FieldNames(**{role: tuple(names) for role, names in content.items()})


def write_manifest(
    folder: str,
    shards: Iterable[Shard],
    *,
    kind: Kind,
    format: str,
    fields: FieldNames,
    root: str = ".",
    digest: str = "ends",
) -> Manifest:
    """Writes both files; a manifest that is there always fits its table.

    Args:
        folder: local or a URL.
        shards: the files in the order of their records; those without records are left out.
        kind: "pairs" or "conversations".
        format: one of `FORMATS`.
        fields: which field is what.
        root: what the paths are relative to, itself relative to the folder.
        digest: one of `DIGESTS`.

    Returns:
        What was written.
    """
    import pyarrow as pa

    rows = [shard for shard in shards if shard.records]
    columns = [
        [shard.path for shard in rows],
        np.cumsum([shard.records for shard in rows], dtype=np.int64),
        [shard.bytes for shard in rows],
        [shard.digest for shard in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _schema())]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _schema()) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=_schema()))
    table = sink.getvalue().to_pybytes()
    manifest = Manifest(
        kind=kind,
        format=format,
        fields=fields,
        records=sum(shard.records for shard in rows),
        bytes=sum(shard.bytes for shard in rows),
        shards=len(rows),
        table_sha256=hashlib.sha256(table).hexdigest(),
        table_bytes=len(table),
        root=root,
        digest=digest,
    )
    storage.remove(storage.join(folder, MANIFEST))
    storage.write(storage.join(folder, TABLE), table)
    storage.write(storage.join(folder, MANIFEST), _pack(manifest))
    return manifest


def _pack(manifest: Manifest) -> bytes:
    content = {"version": VERSION, **dataclasses.asdict(manifest)}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def digest_of(path: str, kind: str = "ends") -> bytes:
    """The digest of a file.

    Args:
        path: local or a URL.
        kind: "ends" covers the size and the first and last 64 KiB, which costs two small reads and
            notices a file that was cut off, replaced or repacked; "full" covers every byte.

    Returns:
        32 bytes, SHA-256.
    """
    file = storage.RangedFile(path)
    try:
        size = file.size
        digest = hashlib.sha256(str(size).encode() + b"\n")
        if kind == "ends":
            pieces = [(0, EDGE), (max(size - EDGE, EDGE), size)]
        else:
            digest = hashlib.sha256()
            pieces = [(start, start + (8 << 20)) for start in range(0, size, 8 << 20)]
        for start, stop in pieces:
            digest.update(file.read(start, min(stop, size)))
    finally:
        file.close()
    return digest.digest()
