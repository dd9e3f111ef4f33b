"""Orders of any number of records in no memory, as functions of a position."""

from __future__ import annotations

import functools

import numpy as np

SMALL = 1 << 18  # up to here a permutation is drawn whole: index_shuffle walks a block of 2**16
ROUNDS = 8  # 4, Grain's own choice, leaves 19% too many near neighbours at 5e9 records


def permute(index: int, length: int, *key: int) -> int:
    """One value of a random permutation of ``range(length)``.

    Args:
        index: 0 <= index < length.
        length: number of elements.
        key: whole numbers >= 0 that choose the permutation, e.g. seed and epoch.

    Returns:
        Where ``index`` goes.
    """
    if length <= SMALL:
        return int(_whole(length, key)[index])
    from grain.experimental import index_shuffle

    largest = length - 1
    # index_shuffle repeats an element where the largest index is a power of two (its block is one
    # bit short), so those lengths permute one element more and walk on when they meet it.
    if largest & (largest - 1) == 0:
        largest += 1
    seed = _seed(key)
    while True:
        index = index_shuffle(index, max_index=largest, seed=seed, rounds=ROUNDS)
        if index < length:
            return index


# A mixture walks all of its parts at once, each on the border of two epochs at worst; a miss costs
# milliseconds for a single example, an entry 1 MB at most.
@functools.lru_cache(maxsize=256)
def _whole(length: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(length).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _seed(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class GlobalOrder:
    """Every epoch a permutation of all records: the best mixing, one read anywhere per record."""

    def __init__(self, size: int, *, lanes: int, key: tuple[int, ...]):
        """Orders a part of a mixture.

        Args:
            size: records.
            lanes: see `mixture`; together they walk one permutation.
            key: of the part.
        """
        self._size, self._lanes, self._key = size, lanes, key

    def __call__(self, lane: int, draw: int) -> int:
        """The record that a lane draws.

        Args:
            lane: which.
            draw: how many it drew before.

        Returns:
            The record's number; an epoch of all lanes meets each once.
        """
        epoch, position = divmod(draw * self._lanes + lane, self._size)
        return permute(position, self._size, *self._key, epoch)


class WindowOrder:
    """Every epoch the shards in a new order, cut evenly among the lanes and shuffled in windows.

    A lane reads a few shards at a time, one after another, as object stores like it; no shard but
    those at the cuts is read by two lanes. Records of one shard come within a window of each other,
    so shards should be shuffled when they are written.
    """

    def __init__(self, ends: np.ndarray, *, window: int, lanes: int, key: tuple[int, ...]):
        """Orders a part of a mixture.

        Args:
            ends: [shards] cumulative records.
            window: records that are shuffled with each other.
            lanes: see `mixture`; a multiple of the hosts keeps every shard on one of them.
            key: of the part.

        Raises:
            ValueError: if there are more lanes than records.
        """
        self._ends, self._window, self._lanes, self._key = ends, window, lanes, key
        # Its own: parts would take one another's place, and an order outlive its pipeline.
        self._shards = functools.lru_cache(maxsize=4)(self._shard_order)
        if lanes > len(self):
            raise ValueError(f"data.lanes={lanes} is more than a part's {len(self)} records.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __call__(self, lane: int, draw: int) -> int:
        """The record that a lane draws; an epoch of a lane meets each of its records once.

        Args:
            lane: which.
            draw: how many it drew before.

        Returns:
            The record's number.
        """
        first, last = (len(self) * i // self._lanes for i in (lane, lane + 1))
        epoch, offset = divmod(draw, last - first)
        window, place = divmod(offset, self._window)
        begin = first + window * self._window
        width = min(self._window, last - begin)
        # In Python's numbers: sets are larger than 2**31.
        place = begin + int(_small((width, *self._key, epoch, lane, window))[place])
        shards, ends = self._shards(epoch)
        at = int(np.searchsorted(ends, place, "right"))
        return int(self._ends[shards[at]] - (ends[at] - place))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in an epoch's order, and their cumulative records in it."""
        counts = np.diff(self._ends, prepend=0)
        shards = np.random.default_rng((*self._key, epoch)).permutation(len(counts))
        return shards, np.cumsum(counts[shards])


@functools.lru_cache(maxsize=1024)
def _small(key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key[1:]).permutation(key[0]).astype(np.int32)
