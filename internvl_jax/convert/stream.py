"""Parameters read by rows, so that a model never has to fit into memory.

A row is what one layer holds of a stacked leaf, or a whole leaf that is not stacked.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import math
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.checkpoint.integrity import HostFingerprint
from internvl_jax.checkpoint.offline import StoredLeaf


class Rows(abc.ABC):
    """A leaf that is read by rows."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def row(self, index: int | None) -> np.ndarray:
        """One layer of a stacked leaf; None for the whole of one that is not stacked."""

    def finish(self) -> None:
        """Raises CheckpointError if what was read is not what was written."""
        return


class ArrayRows(Rows):
    """An array in memory."""

    def __init__(self, array: Any):
        self._array = array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)

    def row(self, index: int | None) -> np.ndarray:
        return np.asarray(self._array if index is None else self._array[index])


class StoredRows(Rows):
    """A leaf of a checkpoint, its fingerprint summed up beside the reading.

    Args:
        leaf: the leaf.
        sums: one thread that fingerprints are computed in.
        scratch: folder for a leaf whose layers cannot be read alone (`StoredLeaf.by_rows`); it is
            laid down there as a plain file first.
    """

    def __init__(self, leaf: StoredLeaf, sums: ThreadPoolExecutor, scratch: Path):
        self._leaf, self._sums, self._scratch = leaf, sums, scratch
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self._host = HostFingerprint()
        self._seen: set[int | None] = set()
        self._pending: list[Future[None]] = []
        self._copy: Path | None = None

    def row(self, index: int | None) -> np.ndarray:
        if index is None or self._leaf.by_rows:
            x = self._leaf[... if index is None else index]
        else:
            x = self._copied(index)
        if index not in self._seen:
            self._seen.add(index)
            self._pending.append(self._sums.submit(self._host.update, x, (index or 0) * x.size))
        # What is not summed up yet is still in memory.
        while len(self._pending) > 1:
            self._pending.pop(0).result()
        return x

    def _copied(self, index: int) -> np.ndarray:
        if self._copy is None:
            self._copy = self._scratch / self._leaf.path.replace("/", ".")
            self._leaf.copy_to(self._copy)
        shape = self.shape[1:]
        count = math.prod(shape)
        offset = index * count * self.dtype.itemsize
        return np.fromfile(self._copy, self.dtype, count, offset=offset).reshape(shape)

    def finish(self) -> None:
        if None not in self._seen and self._seen:
            for index in range(self.shape[0]):  # layers that were not wanted: only compared
                if index not in self._seen:
                    self.row(index)
        for future in self._pending:
            future.result()
        self._pending.clear()
        if self._copy is not None:
            self._copy.unlink()
            self._copy = None
        if self._seen:
            self._leaf.check(self._host)


@contextlib.contextmanager
def stored_rows(leaves: Mapping[str, StoredLeaf], beside: Path) -> Iterator[dict[str, Rows]]:
    """Opens leaves of a checkpoint for reading by rows.

    Args:
        leaves: by the path that they shall have.
        beside: scratch space is made next to this path.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{beside.name}.scratch-"
    for abandoned in beside.parent.glob(f"{prefix}*"):  # by an export that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with (
        ThreadPoolExecutor(1) as sums,
        tempfile.TemporaryDirectory(prefix=prefix, dir=beside.parent) as folder,
    ):
        yield {p: StoredRows(leaf, sums, Path(folder)) for p, leaf in leaves.items()}


def ahead(arrays: Iterable[np.ndarray], limit: int = 1 << 28) -> Generator[np.ndarray, None, None]:
    """The same arrays, the next ones made in another thread meanwhile.

    Args:
        arrays: what to go through; an exception in it is raised here.
        limit: bytes that may wait; a larger array waits alone.
    """
    waiting: collections.deque[np.ndarray] = collections.deque()
    changed = threading.Condition()
    stopped, ended, problem = False, False, None

    def work() -> None:
        nonlocal ended, problem
        try:
            for x in arrays:
                with changed:
                    room = lambda: sum(w.nbytes for w in waiting) + x.nbytes <= limit  # noqa: B023
                    changed.wait_for(lambda: stopped or not waiting or room())  # noqa: B023
                    if stopped:
                        return
                    waiting.append(x)
                    changed.notify_all()
        except BaseException as error:
            problem = error
        finally:
            with changed:
                ended = True
                changed.notify_all()

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                x = waiting.popleft()
                changed.notify_all()
            yield x
            del x  # or it would be held while the next one is waited for
        if problem is not None:
            raise problem
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()
