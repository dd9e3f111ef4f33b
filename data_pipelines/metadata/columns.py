"""Casts whatever type a mirror chose; what cannot be read becomes null."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.metadata.kernels import pc

_NUMBER = r"^\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*$"


def cast(column: Any, field: str, kind: Any) -> Any:
    """A source's column as the type that the schema asks for.

    Args:
        column: Arrow array [n] of any type.
        field: its name in the schema.
        kind: the type there.

    Returns:
        Arrow array [n] of that type: NaN, infinite and unreadable values, sizes below one pixel
        and text that is not UTF-8 are null.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), kind)
    if field == "phash":
        return _hashes(column)
    if field == "uid":
        return _uids(column)
    if pa.types.is_string(kind):
        texts = _strings(column)
        return pc.utf8_lower(texts) if field == "sha256" else texts
    numbers = _numbers(column, kind)
    if field in ("width", "height"):
        return _null_unless(numbers, pc.greater(numbers, 0))
    return numbers


def from_tag(tags: Any) -> Any:
    """LAION's NSFW tag as a probability: only "NSFW" says something, the other two are null."""
    nsfw = pc.fill_null(pc.equal(_strings(tags), "NSFW"), False)
    return pc.if_else(nsfw, pa.scalar(1.0, pa.float32()), pa.scalar(None, pa.float32()))


def _null_unless(column: Any, keep: Any) -> Any:
    return pc.if_else(pc.fill_null(keep, False), column, pa.scalar(None, column.type))


def _strings(column: Any) -> Any:
    if pa.types.is_string(column.type):
        return column
    try:
        return pc.cast(column, pa.string())
    except pa.ArrowInvalid:  # bytes that are not UTF-8
        return pa.array([_text(value) for value in column.to_pylist()], pa.string())


def _text(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _numbers(column: Any, kind: Any) -> Any:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        texts = _strings(column)
        readable = pc.match_substring_regex(texts, _NUMBER)
        texts = _null_unless(texts, readable)
        column = pc.cast(pc.utf8_trim_whitespace(texts), pa.float64())
    if pa.types.is_floating(column.type):
        column = _null_unless(column, pc.is_finite(column))
    if pa.types.is_integer(kind):
        inside = pc.and_(pc.greater(column, -(2**31)), pc.less(column, 2**31))
        column = _null_unless(column, inside)
    return pc.cast(column, kind, safe=False)


def _hex_words(texts: Any, digits: int) -> tuple[np.ndarray, Any]:
    """[n, digits / 16] uint64 and which rows were hex digits of that number."""
    valid = pc.fill_null(pc.match_substring_regex(texts, f"^[0-9a-fA-F]{{{digits}}}$"), False)
    filled = pc.if_else(valid, texts, "0" * digits).to_pylist()
    raw = bytes.fromhex("".join(filled))
    return np.frombuffer(raw, ">u8").reshape(-1, digits // 16), valid


def _hashes(column: Any) -> Any:
    if pa.types.is_integer(column.type):
        return (
            column.view(pa.uint64()) if column.type == pa.int64() else pc.cast(column, pa.uint64())
        )
    words, valid = _hex_words(_strings(column), 16)
    return _null_unless(pa.array(words[:, 0].astype(np.uint64)), valid)


def _uids(column: Any) -> Any:
    if pa.types.is_fixed_size_binary(column.type) and column.type.byte_width == 16:
        return column
    words, valid = _hex_words(_strings(column), 32)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(words))]
    return _null_unless(
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(words), buffers), valid
    )
