"""Safetensors files tensor by tensor: the library holds a whole file in memory, or maps it.

The format is https://huggingface.co/docs/safetensors: eight bytes that give the header's length, a
JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# What parameters are written as, by the names that commands and configs give them.
FLOATS = {str(DTYPES[name]): DTYPES[name] for name in ("F32", "BF16", "F16")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(ValueError):
    """Files that are not the weights of the model; the message is one sentence."""


class Shard:
    """One file's tensors, each read into memory of its own when it is asked for."""

    def __init__(self, path: Path):
        """Opens a file. Raises WeightsError where it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np"):  # checks the header against the file's length
                pass
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {error}") from None
        self.path = path
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._at = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        self._dtype = {name: entry["dtype"] for name, entry in header.items()}
        self.shapes: dict[str, Shape] = {n: tuple(entry["shape"]) for n, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor. Raises WeightsError for a type that numpy does not have."""
        if self._dtype[name] not in DTYPES:
            raise WeightsError(
                f"{name} in {self.path} has the type {self._dtype[name]}, which cannot be read."
            )
        dtype, shape = DTYPES[self._dtype[name]], self.shapes[name]
        count = math.prod(shape)
        x = np.fromfile(self.path, dtype, count, offset=self._at[name])
        if x.size != count:
            raise WeightsError(f"{self.path} ends inside of {name}: it was cut off.")
        return x.reshape(shape)


def divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Which tensors share a file.

    Args:
        sizes: bytes by name, in the order of writing.
        limit: most bytes of a file; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write(
    path: Path,
    names: Sequence[str],
    layout: Mapping[str, tuple[Shape, np.dtype]],
    arrays: Iterator[np.ndarray],
    metadata: Mapping[str, str],
) -> str:
    """Writes one file, one array in memory at a time; `settle` has it on the disk.

    Args:
        path: the file.
        names: its tensors, in order.
        layout: shape and dtype by name.
        arrays: their values in the same order; no more than these are taken.
        metadata: text for the header.

    Returns:
        The file's SHA-256, hexadecimal.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        shape, dtype = layout[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=_NAMES[dtype], shape=shape, data_offsets=(begin, end))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            file.write(piece)
            digest.update(piece)
        for name, x in zip(names, arrays, strict=False):
            shape, dtype = layout[name]
            if x.shape != shape or x.dtype != dtype or not x.flags.c_contiguous:
                raise AssertionError(f"{name} is {x.dtype}{list(x.shape)}, not what was announced")
            data = x.reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path} lacks tensors that were announced")
    return digest.hexdigest()


def settle(path: Path) -> None:
    """Returns when a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
