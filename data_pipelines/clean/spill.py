"""Columns of 8 bytes that are written part by part and read partition by partition."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from data_pipelines.clean.steps import split


class SpillWriter:
    """Writes one file; until `close` it has another name, so that half a file is never read.

    Args:
        path: of the file, without an ending.
        partitions: of the first column, the key.
    """

    def __init__(self, path: pathlib.Path, partitions: int):
        self.path, self.partitions = path, partitions
        self.index: list[tuple[int, int, int]] = []  # partition, byte, rows
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path.with_suffix(".tmp"), "wb")  # noqa: SIM115 (closed in `close`)

    def add(self, key: np.ndarray, *others: np.ndarray) -> None:
        """Appends rows.

        Args:
            key: [n] uint64.
            *others: further columns [n] uint64, always as many.
        """
        for number, columns in split(key, self.partitions, *others):
            self.index.append((number, self.file.tell(), len(columns[0])))
            for column in columns:
                self.file.write(column.data)

    def close(self) -> None:
        """Gives the file its name; its index comes last and says that it is whole."""
        self.file.close()
        os.replace(self.path.with_suffix(".tmp"), self.path.with_suffix(".bin"))
        with open(self.path.with_suffix(".tmp"), "wb") as file:
            np.save(file, np.array(self.index, np.int64).reshape(-1, 3))
        os.replace(self.path.with_suffix(".tmp"), self.path.with_suffix(".npy"))


def is_whole(path: pathlib.Path) -> bool:
    """Whether a writer of this path was closed."""
    return path.with_suffix(".npy").exists()


def read_partition(paths: list[pathlib.Path], number: int, columns: int) -> list[np.ndarray]:
    """All rows of one partition.

    Args:
        paths: of the writers.
        number: of the partition.
        columns: how many were written.

    Returns:
        The columns, [n] uint64 each.
    """
    indices = [np.load(path.with_suffix(".npy")) for path in paths]
    indices = [index[index[:, 0] == number] for index in indices]
    made = [np.empty(sum(int(i[:, 2].sum()) for i in indices), np.uint64) for _ in range(columns)]
    end = 0
    for path, index in zip(paths, indices):
        if not len(index):
            continue
        with open(path.with_suffix(".bin"), "rb", buffering=0) as file:
            for _, byte, rows in index:
                file.seek(byte)
                for column in made:
                    column[end : end + rows] = np.fromfile(file, np.uint64, rows)
                end += rows
    return made
