"""Keys of 8 bytes by which rows are compared, and the 16-byte uid of a row.

The hash is our own, so that it is the same in every driver, on every machine and in every release
of a library: words of 8 bytes are mixed with their place, summed and mixed again with the length.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.metadata.kernels import pc

U64 = np.uint64
_PLACE = U64(0x9E3779B97F4A7C15)
_HTTPS, _HTTP = (U64(int.from_bytes(b, "little")) for b in (b"https://", b"http://"))
_SEVEN = U64(2**56 - 1)
_BLOCK = 16384  # rows that are hashed at a time
_MIX = (U64(0xFF51AFD7ED558CCD), U64(0xC4CEB9FE1A85EC53))

# What needs no more than its scheme and "www." taken off.
_PLAIN_URL = r"^https?://[a-z0-9.\-]+/[^#\s]*[^#\s/]$"
_SPACE = " \t\r\n\f\v"
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.\-]*://|^//")


def normalise_url(url: str) -> str:
    """The form under which two URLs count as one.

    Scheme, "www.", the default ports, fragment and trailing slashes go, the host is lower-cased;
    path and query stay as they are.

    Args:
        url: as a source gives it.

    Returns:
        The normal form, e.g. "example.com/a.jpg?w=1".
    """
    rest = _SCHEME.sub("", url.strip(_SPACE)).split("#", 1)[0]
    split = re.search(r"[/?]", rest)
    end = split.start() if split else len(rest)
    host, path = rest[:end].lower().removeprefix("www."), rest[end:]
    host = re.sub(r":(80|443)$", "", host)
    return host + path.rstrip("/")


def hash_strings(column: Any, seed: int = 0) -> np.ndarray:
    """Hashes every string of a column.

    Args:
        column: Arrow string array [n]; nulls are hashed as "".
        seed: another one gives an independent hash.

    Returns:
        [n] uint64.
    """
    data, starts, ends = _bytes_of(column)
    return _hash(data, starts, ends, seed)


def url_keys(column: Any) -> np.ndarray:
    """Hashes of the normal form of URLs, see `normalise_url`.

    Args:
        column: Arrow string array [n] without nulls.

    Returns:
        [n] uint64.
    """
    data, starts, ends = _bytes_of(column)
    words = _words_at(data, starts)
    secure = words == _HTTPS
    skip = np.where(secure, 8, 7)
    rows = _unusual(data, starts, ends, secure | (words & _SEVEN == _HTTP))
    # Most capitals stand in a path, where they may.
    texts = column.take(pa.array(rows))
    plain = pc.match_substring_regex(texts, _PLAIN_URL).to_numpy(zero_copy_only=False)
    rows = rows[~plain]
    www = _words_at(data, np.minimum(starts + skip, len(data) - 16)) & U64(0xFFFFFFFF)
    skip += np.where(www == U64(int.from_bytes(b"www.", "little")), 4, 0)
    keys = _hash(data, np.minimum(starts + skip, ends), ends, 0)
    if len(rows):
        texts = [normalise_url(url) for url in texts.filter(pa.array(~plain)).to_pylist()]
        keys[rows] = hash_strings(pa.array(texts, pa.string()))
    return keys


def _unusual(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Rows whose URL may need more than its scheme and "www." taken off."""
    marks = (data - np.uint8(ord("A")) < 26) | (data == ord("#"))
    colons = data == ord(":")  # behind the scheme's: a port, perhaps
    colons[starts[known] + np.where(data[starts[known] + 4] == ord("s"), 5, 4)] = False
    marks |= colons
    found = np.searchsorted(starts, np.flatnonzero(marks), "right") - 1
    last = data[np.maximum(ends - 1, 0)]
    odd = ~known | (last == ord("/")) | (last <= ord(" "))
    odd[found] = True
    return np.flatnonzero(odd)


def caption_keys(column: Any) -> np.ndarray:
    """Hashes of captions without regard to case and white space.

    Args:
        column: Arrow string array [n].

    Returns:
        [n] uint64.
    """
    squeezed = pc.replace_substring_regex(pc.utf8_lower(column), r"\s+", " ")
    return hash_strings(pc.utf8_trim_whitespace(squeezed), seed=1)


def combine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One key out of two.

    Args:
        first: [n] uint64.
        second: [n] uint64.

    Returns:
        [n] uint64.
    """
    return _finish(first * _PLACE + second)


def make_uids(urls: Any, captions: Any) -> Any:
    """Names rows by their content: the hash of the URL, then that of the caption, both as given.

    Args:
        urls: Arrow string array [n].
        captions: Arrow string array [n].

    Returns:
        Arrow array [n] of 16 bytes.
    """
    pair = np.stack([hash_strings(urls, 2), hash_strings(captions, 3)], axis=1)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(pair, ">u8"))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(pair), buffers)


def _bytes_of(column: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The column's bytes with 8 or more behind them, and where every row begins and ends."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    first, last = (int(ends[0]), int(ends[-1])) if len(column) else (0, 0)
    padded = np.zeros((last - first + 31) // 8 * 8, np.uint8)
    if data is not None:
        padded[: last - first] = np.frombuffer(data, np.uint8)[first:last]
    places = ends.astype(np.int64) - first
    if column.null_count:  # a null may have bytes behind it
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        return padded, places[:-1], np.where(valid, places[1:], places[:-1])
    return padded, places[:-1], places[1:]


def _words_at(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The 8 bytes from every place on, out of the two aligned words that hold them."""
    words = data.view("<u8")
    word = places >> 3
    bit = (places & 7).astype(U64) << U64(3)
    found = words[word] >> bit
    word += 1
    # By 64 - bit, in two steps, since a shift by 64 is not defined.
    found |= (words[word] << U64(1)) << (U64(63) - bit)
    return found


def _finish(x: np.ndarray) -> np.ndarray:
    shifted = x >> U64(33)
    x ^= shifted
    x *= _MIX[0]
    np.right_shift(x, U64(33), out=shifted)
    x ^= shifted
    x *= _MIX[1]
    np.right_shift(x, U64(33), out=shifted)
    x ^= shifted
    return x


def _hash(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, seed: int) -> np.ndarray:
    made = np.empty(len(starts), U64)
    for row in range(0, len(starts), _BLOCK):  # small enough for what is between to stay in cache
        rows = slice(row, row + _BLOCK)
        made[rows] = _hash_block(data, starts[rows], ends[rows] - starts[rows], seed)
    return made


def _hash_block(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Rows of as many words are mixed together, as a matrix."""
    words = data.view("<u8")
    made = np.zeros(len(starts), U64)
    counts = (lengths + 7) >> 3
    sizes = np.bincount(counts)
    # Of 16 bits it is a radix sort.
    order = np.argsort(counts.astype(np.uint16 if len(sizes) < 65536 else U64), kind="stable")
    ends = np.cumsum(sizes)
    salt = U64(seed * 0x632BE59BD9B4E019 + 1 & 2**64 - 1)
    for count in np.flatnonzero(sizes[1:]) + 1:
        rows = order[ends[count] - sizes[count] : ends[count]]
        first, length = starts[rows], lengths[rows]
        place = np.arange(count)[:, None]  # rows side by side, which sums them fastest
        bit = (first & 7).astype(U64) << U64(3)
        # The 8 bytes at any place, out of the aligned words that hold the first and the last.
        mixed = words.take((first >> 3) + place)
        mixed >>= bit
        behind = words.take((first + 7 >> 3) + place)
        behind <<= U64(64) - bit & U64(63)
        mixed |= behind
        missing = (8 * count - length << 3).astype(U64)  # bits of the last word, 0 to 56
        mixed[-1] &= U64(2**64 - 1) >> missing
        mixed += place.astype(U64) * _PLACE + salt
        made[rows] = _finish(mixed).sum(axis=0)
    return _finish(made + lengths.astype(U64) * _PLACE)
