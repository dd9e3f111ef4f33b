"""Which rows are duplicates: pure functions over keys and positions.

A position is a row's place in the order of the corpus (part << 40 | row); of equal rows the one
with the smallest position stays. What comes out does not depend on the order of what goes in.
"""

from __future__ import annotations

import itertools

import numpy as np

U64 = np.uint64


def repeated(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """All rows but the first of every key.

    Args:
        keys: [n] uint64.
        positions: [n] uint64, each once.

    Returns:
        Positions to drop, ascending uint64.
    """
    order, _, counts = _groups(keys)
    many = counts > 1
    rows = order[np.repeat(many, counts)]
    if not len(rows):
        return np.empty(0, U64)
    counts = counts[many]
    places = positions[rows]
    firsts = np.minimum.reduceat(places, np.cumsum(counts) - counts)
    return np.sort(places[places != np.repeat(firsts, counts)])


def frequent(keys: np.ndarray, positions: np.ndarray, most: int) -> np.ndarray:
    """All rows of the keys that occur too often.

    Args:
        keys: [n] uint64.
        positions: [n] uint64, each once.
        most: how often a key may occur.

    Returns:
        Positions to drop, ascending uint64.
    """
    order, _, counts = _groups(keys)
    return np.sort(positions[order[np.repeat(counts > most, counts)]])


def firsts(keys: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of every key.

    Args:
        keys: [n] uint64.
        positions: [n] uint64, each once.

    Returns:
        The keys, ascending, and their smallest positions.
    """
    order, starts, _ = _groups(keys)
    if not len(keys):
        return keys, positions
    return keys[order[starts]], np.minimum.reduceat(positions[order], starts)


def _groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in the order of their keys; where every key begins there; how often it stands."""
    order = np.argsort(keys)
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    return order, starts, np.diff(np.append(starts, len(keys)))


def masks(distance: int, bands: int) -> list[int]:
    """Parts of a hash of which one at least is equal in two hashes that differ little.

    Of `bands` bands, `distance` differing bits touch as many at most, so the others are equal:
    one mask for every choice of the others. More bands than distance + 1 make the masks longer and
    the groups of equal parts smaller, which a corpus of billions needs.

    Args:
        distance: most differing bits.
        bands: into which the 64 bits are cut, more than `distance`.

    Returns:
        64-bit masks.
    """
    edges = [round(64 * i / bands) for i in range(bands + 1)]
    parts = [(1 << b) - (1 << a) for a, b in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(parts, bands - distance)]


def near(
    groups: np.ndarray, hashes: np.ndarray, positions: np.ndarray, distance: int
) -> np.ndarray:
    """Rows that have an earlier one within a Hamming distance in their group.

    Args:
        groups: [n] uint64, rows are compared where these are equal.
        hashes: [n] uint64.
        positions: [n] uint64; a row may stand in several groups, once in each.
        distance: most differing bits.

    Returns:
        Positions to drop, ascending uint64.
    """
    order, _, counts = _groups(groups)
    groups, hashes, positions = groups[order], hashes[order], positions[order]
    dropped = np.zeros(len(groups), bool)
    for step in range(1, int(counts.max(initial=1))):
        # Every pair of a group stands some steps apart; rows without a partner leave.
        left = np.flatnonzero(groups[step:] == groups[:-step])
        bits = np.bitwise_count(hashes[left] ^ hashes[left + step])
        pairs = left[bits <= distance]
        later = np.where(positions[pairs] < positions[pairs + step], pairs + step, pairs)
        dropped[later] = True
    return np.unique(positions[dropped])


class NearIndex:
    """Looks hashes up in a fixed list, within a Hamming distance.

    Args:
        hashes: [m] uint64; 16 bytes are kept for each and every mask.
        distance: most differing bits.
        bands: see `masks`.
    """

    def __init__(self, hashes: np.ndarray, distance: int, bands: int = 4):
        self.distance = distance
        self.tables = []
        for mask in masks(distance, bands):
            parts = hashes & U64(mask)
            order = np.argsort(parts)
            self.tables.append((U64(mask), parts[order], hashes[order]))

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """Which of [n] uint64 hashes are near one of the list, [n] bool."""
        found = np.zeros(len(hashes), bool)
        for mask, parts, listed in self.tables:
            wanted = hashes & mask
            start = np.searchsorted(parts, wanted, "left")
            stop = np.searchsorted(parts, wanted, "right")
            rows = np.flatnonzero((stop > start) & ~found)
            while len(rows):
                bits = np.bitwise_count(listed[start[rows]] ^ hashes[rows])
                found[rows] |= bits <= self.distance
                start[rows] += 1
                rows = rows[(start[rows] < stop[rows]) & ~found[rows]]
        return found
