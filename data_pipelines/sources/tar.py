"""Samples of webdataset tars, as img2dataset writes them, by number and without a rewrite.

Beside every tar lies an index (``NAME.tar.idx``, 4 bytes per sample) of where its samples begin, so
that one ranged read brings a sample. Which members are a sample is webdataset's rule: regular files
that follow each other and share all of their path up to the first dot of the file name; what comes
after that dot, in lower case, names the field. Member names are only that: nothing is ever
extracted.

Source: https://github.com/webdataset/webdataset; POSIX.1-1988 (ustar), POSIX.1-2001 (PAX), and GNU
tar's long names and base-256 numbers. Not read: sparse files, and settings that a PAX header makes
for the whole archive.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, Fields, storage
from data_pipelines.sources.lru import Lru
from data_pipelines.sources.shards import Shards, as_shards, count, locate, span

BLOCK = 512
MAX_SAMPLE = 256 << 20
"""Bytes of a sample beyond which it is refused."""
MAX_NAME = 1 << 20
"""Bytes of the headers that hold a long name."""
OPEN_FILES = 128
INDEX_BYTES = 256 << 20

_HEADER = struct.Struct("<8sQqQ")  # magic, bytes and time of the tar, samples
_MAGIC = b"TARIDX01"
_BARE = b"123456"  # links, devices, folders, pipes: whatever their size says, no data follows
_REGULAR = b"0\x007"
_EXTENSIONS = b"LKxXg"  # what they hold is about the next member


class Member(NamedTuple):
    """A regular file in a tar; offsets in bytes.

    Attributes:
        name: its path in the archive.
        start: of its first header.
        data: of its content.
        size: of its content.
    """

    name: bytes
    start: int
    data: int
    size: int


def members(
    read: Callable[[int, int], bytes], start: int, stop: int, label: str
) -> Iterator[Member]:
    """Walks over the headers of a tar.

    Args:
        read: (from, to) -> bytes of the file.
        start: offset of a header.
        stop: end of the file, or of the part to look at.
        label: what to call the file in errors.

    Yields:
        The regular files.

    Raises:
        BadShardError: if there is no header where one must be, or the file ends too early.
    """
    first = at = start
    name: bytes | None = None
    true_size: int | None = None
    while at < stop:
        block = read(at, at + BLOCK)
        if len(block) < BLOCK:
            raise BadShardError(f"{label} is cut off at byte {at}; fetch it again.")
        if not block[0] and not any(block):
            break  # the mark of the end
        if sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156], label, at):
            raise BadShardError(f"{label} has no tar header at byte {at}; fetch it again.")
        kind, data = block[156:157], at + BLOCK
        size = _number(block[124:136], label, at)
        if true_size is not None and kind not in _EXTENSIONS:
            size = true_size
        after = data + (0 if kind in _BARE else -(-size // BLOCK) * BLOCK)
        if after > stop:
            raise BadShardError(
                f"{label} is cut off: the member at byte {at} would end at {after}, the file has "
                f"{stop}; fetch it again."
            )
        if kind in _EXTENSIONS:
            if size > MAX_NAME:
                raise BadShardError(f"{label} has a name of {size} bytes at byte {at}.")
            text = read(data, data + size) if kind in b"LxX" else b""
            if kind == b"L":
                name = text.split(b"\0", 1)[0] if name is None else name
            elif text:
                settings = _settings(text, label, at)
                name = settings.get(b"path") if name is None else name
                if b"size" in settings and true_size is None:
                    true_size = _decimal(settings[b"size"], label, at)
            at = after
            continue
        if kind == b"S":
            raise BadShardError(f"{label} has a sparse member at byte {at}; pack it again.")
        own = block[:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and block[345]:
            own = block[345:500].split(b"\0", 1)[0] + b"/" + own
        # Before POSIX a folder was a file whose name ends in a slash.
        if kind in _REGULAR and not (kind == b"\0" and own.endswith(b"/")):
            yield Member(own if name is None else name, first, data, size)
        first, at, name, true_size = after, after, None, None


def _number(field: bytes, label: str, at: int) -> int:
    try:
        if field[0] == 0x80:  # base 256
            return int.from_bytes(field[1:], "big")
        value = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise BadShardError(f"{label} has a broken number in the header at byte {at}.")
    return value


def _decimal(text: bytes, label: str, at: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise BadShardError(f"{label} has a broken size in the PAX header at byte {at}.")
    return int(text)


def _settings(text: bytes, label: str, at: int) -> dict[bytes, bytes]:
    found, place = {}, 0
    while place < len(text) and text[place]:
        length = text[place : place + 20].split(b" ", 1)[0]
        end = place + (int(length) if length.isdigit() else 0)
        key, equals, value = text[place + len(length) + 1 : end - 1].partition(b"=")
        if not place < end <= len(text) or not equals or text[end - 1 : end] != b"\n":
            raise BadShardError(f"{label} has a broken PAX header at byte {at}.")
        if key.startswith(b"GNU.sparse."):
            raise BadShardError(f"{label} has a sparse member at byte {at}; pack it again.")
        found[key], place = value, end
    return found


def split_name(name: bytes) -> tuple[bytes, str] | None:
    """Key and field of a member.

    Args:
        name: its path in the archive.

    Returns:
        The path up to the first dot of the file name, and the rest in lower case; None where the
        name has no dot or nothing before it (hidden files), or is ``__like.this__``.
    """
    folder, slash, file = name.rpartition(b"/")
    stem, dot, extension = file.partition(b".")
    if not stem or not dot or (not slash and file.startswith(b"__") and file.endswith(b"__")):
        return None
    return folder + slash + stem, extension.decode("utf-8", "replace").lower()


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the samples of a tar begin.

    Attributes:
        blocks: [n + 1] uint32, in blocks of 512 bytes; the last is the end of the last sample.
        bytes: size of the tar.
        changed: time of its last change in nanoseconds, 0 if not known.
    """

    blocks: np.ndarray
    bytes: int
    changed: int

    def __len__(self) -> int:
        return len(self.blocks) - 1

    def pack(self) -> bytes:
        """What the index file holds."""
        head = _HEADER.pack(_MAGIC, self.bytes, self.changed, len(self))
        return head + self.blocks.astype("<u4").tobytes()


def scan(path: str) -> Index:
    """Finds the samples of a tar; of a local file only the headers are read.

    Args:
        path: local or a URL (read whole, in large pieces).

    Returns:
        The index.

    Raises:
        BadShardError: if the tar is broken, cut off, or larger than 2 TiB.
    """
    size, changed = storage.stat(path)
    if size >= BLOCK << 32:
        raise BadShardError(f"{path} has {size} bytes; an index reaches to 2 TiB.")
    file = storage.RangedFile(path)
    try:
        # Captions and headers are small and next to each other: one read serves several.
        ahead = (16 << 20) if storage.is_remote(path) else 4096
        begin, held = 0, b""

        def read(start: int, stop: int) -> bytes:
            nonlocal begin, held
            if start < begin or stop > begin + len(held):
                begin, held = start, file.read(start, max(stop, start + ahead))
            return held[start - begin : stop - begin]

        starts, end, last = [], 0, None
        for name, start, data, length in members(read, 0, size, path):
            parts = split_name(name)
            if parts is None:
                continue
            if parts[0] != last:
                starts.append(start // BLOCK)
                last = parts[0]
            end = -(-(data + length) // BLOCK)
        # Blocks of zeros end a tar; without them it may have been cut off between two members.
        if size < BLOCK or any(file.read(size - BLOCK, size)):
            raise BadShardError(f"{path} is cut off: its end mark is missing; fetch it again.")
    finally:
        file.close()
    return Index(np.asarray([*starts, end], np.uint32), size, changed)


def read_index(path: str) -> Index:
    """Reads an index file.

    Args:
        path: of the index, local or a URL.

    Returns:
        The index.

    Raises:
        FileNotFoundError: if it is not there.
        BadShardError: if it is no index or a broken one.
    """
    broken = BadShardError(f"{path} is no index of a tar or a broken one; index the folder again.")
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The index {path} is missing; run python -m data_pipelines.build index."
        ) from error
    if len(data) < _HEADER.size + 4:
        raise broken
    magic, size, changed, samples = _HEADER.unpack_from(data)
    blocks = np.frombuffer(data, "<u4", offset=_HEADER.size) if len(data) % 4 == 0 else None
    if magic != _MAGIC or blocks is None or len(blocks) != samples + 1:
        raise broken
    if np.any(blocks[1:] <= blocks[:-1]) or int(blocks[-1]) * BLOCK > size:
        raise broken
    return Index(blocks, size, changed)


class TarSource:
    """The samples of several tars, one after another: field -> bytes, and "__key__"."""

    def __init__(
        self,
        shards: Shards | Sequence[tuple[str | os.PathLike, int]],
        *,
        open_files: int = OPEN_FILES,
    ):
        """Names the files; none is opened yet.

        Args:
            shards: the tars, each with its index, and their numbers of samples.
            open_files: most tars held open.
        """
        self._shards, self._open_files = as_shards(shards), open_files
        self._tars = Lru(self._open, _close, items=open_files, bytes=INDEX_BYTES)

    def __len__(self) -> int:
        return count(self._shards.ends)

    def __getitem__(self, index: int) -> Fields:
        """Reads a sample.

        Args:
            index: its number.

        Returns:
            Extension -> bytes, and "__key__" -> str.

        Raises:
            BadRecordError: if the sample is too large or has two members of one name.
            BadShardError: if the tar is not the one that was indexed.
            FileNotFoundError: if the tar or its index is missing.
        """
        shard, position = locate(self._shards.ends, index)
        with self._tars.lend(shard) as (file, blocks):
            start, stop = (int(block) * BLOCK for block in blocks[position : position + 2])
            if stop - start > MAX_SAMPLE:
                raise BadRecordError(
                    "too large", f"Sample {position} of {file.path} has {stop - start} bytes."
                )
            data = file.read(start, stop)
        if len(data) < stop - start:
            raise _stale(file.path)
        return _parse(data, file.path, position)

    def _open(self, shard: int) -> tuple[tuple[storage.RangedFile, np.ndarray], int]:
        path = self._shards.path(shard)
        index = read_index(self._shards.index_path(shard))
        if len(index) != span(self._shards.ends, shard):
            raise BadShardError(
                f"The index of {path} has {len(index)} samples, the manifest "
                f"{span(self._shards.ends, shard)}; index the folder again."
            )
        try:
            file = storage.RangedFile(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The tar {path} is missing; fetch it, or index the folder again."
            ) from error
        # An object store would be asked once more for every tar; there the headers must tell.
        if not storage.is_remote(path) and file.size != index.bytes:
            file.close()
            raise _stale(path)
        return (file, index.blocks), index.blocks.nbytes

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        self._tars.close()

    def __reduce__(self):
        return _make, (self._shards, self._open_files)


def _make(shards: Shards, open_files: int) -> TarSource:
    return TarSource(shards, open_files=open_files)


def _close(opened: tuple[storage.RangedFile, np.ndarray]) -> None:
    opened[0].close()


def _stale(path: str) -> BadShardError:
    return BadShardError(f"{path} has changed since it was indexed; index the folder again.")


def _parse(data: bytes, path: str, position: int) -> Fields:
    fields: dict[str, bytes | str] = {}
    key = None
    try:
        for member in members(lambda a, b: data[a:b], 0, len(data), path):
            parts = split_name(member.name)
            if parts is None:
                continue
            if key is not None and parts[0] != key:
                raise _stale(path)
            key = parts[0]
            if parts[1] in fields:
                raise BadRecordError(
                    "two members", f"Sample {position} of {path} has two members {parts[1]!r}."
                )
            fields[parts[1]] = data[member.data : member.data + member.size]
    except BadShardError as error:
        raise _stale(path) from error
    if key is None:
        raise _stale(path)
    fields["__key__"] = key.decode("utf-8", "replace")
    return fields
