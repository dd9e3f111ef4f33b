"""Read a checkpoint without a device, leaf by leaf or layer by layer: for conversion and a look.

Stacked leaves are stored one chunk per layer, so a checkpoint larger than the host's memory can
be streamed; whatever is read to its end is compared with its fingerprint.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from internvl_jax import tree as trees
from internvl_jax.checkpoint.integrity import HostFingerprint
from internvl_jax.checkpoint.reading import open_stores
from internvl_jax.checkpoint.storage import CheckpointError, brief, find_step, load_meta


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """An array on disk that is read on demand: whole, by slices, or layer by layer."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fingerprint: str
    _store: tensorstore.TensorStore

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read a slice, unchecked.

        Args:
            index: basic numpy index.

        Returns:
            The slice, in the stored dtype.

        Raises:
            CheckpointError: its file is gone, cut off or unreadable.
        """
        stored = self._store[index]
        # Into memory of numpy's, which is faulted in by large pages: twice as fast as into its own.
        x = np.empty(stored.shape, self.dtype)
        try:
            tensorstore.array(x).write(stored).result()
        except Exception as error:  # TensorStore raises several types
            raise CheckpointError(f"leaf {self.path} can't be read ({brief(error)}).") from error
        return x

    def rows(self) -> Iterator[np.ndarray]:
        """Read along the leading axis, one entry at a time.

        Yields:
            ``leaf[0]``, ``leaf[1]``, …; a scalar yields itself once.

        Raises:
            CheckpointError: after the last entry, when they were not what was written.
        """
        host = HostFingerprint()
        for index in range(self.shape[0]) if self.shape else [...]:
            row = self[index]
            host.update(row)
            yield row
        self.check(host)

    def read(self) -> np.ndarray:
        """Read and check the whole array.

        Returns:
            The array in the stored dtype.

        Raises:
            CheckpointError: it is not what was written.
        """
        whole, host = self[...], HostFingerprint()
        host.update(whole)
        self.check(host)
        return whole

    @property
    def by_rows(self) -> bool:
        """Whether one entry of the leading axis can be read without reading the others."""
        chunk = self._store.chunk_layout.read_chunk.shape if self.shape else None
        return not chunk or chunk[0] == 1 or self.shape[0] == 1

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """Copies the array to a plain file in row-major order, one stored chunk at a time.

        For a layout in which a layer cannot be read alone (`by_rows`).

        Args:
            path: the file, of as many bytes as the array has; replaced.
        """
        with open(path, "wb") as file:
            file.truncate(math.prod(self.shape) * self.dtype.itemsize)
        stored = self._store.chunk_layout.read_chunk.shape
        chunk = [n or size for n, size in zip(stored or self.shape, self.shape, strict=True)]
        starts = (range(0, size, step) for size, step in zip(self.shape, chunk, strict=True))
        for corner in itertools.product(*starts):
            index = tuple(slice(c, c + n) for c, n in zip(corner, chunk, strict=True))
            # Mapped anew for each chunk: what is written does not stay counted as our memory.
            np.memmap(path, self.dtype, "r+", shape=self.shape)[index] = self[index]

    def check(self, host: HostFingerprint) -> None:
        """Compare what was read piece by piece with what was written.

        Args:
            host: has seen every element.

        Raises:
            CheckpointError: they differ.
        """
        if host.text() != self.fingerprint:
            raise CheckpointError(
                f"leaf {self.path} is not what was written: its bits changed in storage."
            )


def iter_leaves(path: epath.PathLike, step: int | None = None) -> Iterator[StoredLeaf]:
    """Open the leaves of a saved step one after another, reading nothing yet.

    Args:
        path: a work directory, its ``checkpoints`` directory, or one step's directory.
        step: which step; the newest finished one by default.

    Yields:
        The leaves in the order of their paths.

    Raises:
        CheckpointError: there is no such step or a leaf can't be opened.
    """
    step_dir = find_step(path, step)
    for name, leaf in sorted(load_meta(step_dir).leaves.items()):
        try:
            store = open_stores(step_dir, {name: leaf})[name]
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"leaf {name} of {step_dir} can't be opened.") from error
        yield StoredLeaf(name, leaf.shape, np.dtype(leaf.dtype), leaf.fingerprint, store)


def read_tree(path: epath.PathLike, step: int | None = None, prefix: str = "") -> dict[str, Any]:
    """Read a saved step, or a part of it, into host memory without touching a device.

    Args:
        path: a work directory, its ``checkpoints`` directory, or one step's directory.
        step: which step; the newest finished one by default.
        prefix: only leaves below this path, for example ``params``; it is left out of the result.

    Returns:
        Nested dict of numpy arrays in the stored dtypes.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    start = f"{prefix}/" if prefix else ""
    leaves = (leaf for leaf in iter_leaves(path, step) if leaf.path.startswith(start))
    return trees.unflatten({leaf.path[len(start) :]: leaf.read() for leaf in leaves})
