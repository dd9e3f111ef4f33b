"""Which part of a mixture example g of a run comes from, and its how-manieth draw it is.

A closed form, so that any step can be asked for and nothing is stored. The global batch is cut into
``lanes``: places that walk the data side by side (`shuffle.WindowOrder` needs them to be a host's
own; else one will do). A lane's examples come in blocks of `BLOCK`; every block holds each part in
the same exact number, in an order of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 14
"""Examples a block: weights are honoured to 6e-5, and a part is never further off than that."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A part over a whole run.

    Attributes:
        name: of the part.
        records: it holds.
        examples: of the run that come from it.
        times: each record is seen, on average.
    """

    name: str
    records: int
    examples: int
    times: float


class Mixture:
    """Parts in given shares, that may change at given steps."""

    def __init__(
        self,
        weights: Sequence[Sequence[tuple[int, float]]],
        *,
        seed: int,
        global_batch: int,
        lanes: int = 1,
    ):
        """Divides examples among parts.

        Args:
            weights: for every part (first step, weight from there on)…, the first at step 0.
            seed: of the order within blocks.
            global_batch: examples per step over all hosts.
            lanes: places that walk the data side by side.

        Raises:
            ValueError: if a step has no part, or the batch does not divide over the lanes.
        """
        if global_batch % lanes:
            raise ValueError(
                f"data.lanes={lanes} does not divide the global batch of {global_batch}."
            )
        self._seed, self._batch, self._share = seed, global_batch, global_batch // lanes
        self._starts = sorted({step for part in weights for step, _ in part})
        self._counts = [
            _apportion([_weight_at(part, step) for part in weights], step) for step in self._starts
        ]
        self.lanes = lanes

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        """Where an example comes from.

        Args:
            number: g = step * global batch + place.

        Returns:
            Its part, its lane, and how many examples this lane drew from that part before.
        """
        step, place = divmod(number, self._batch)
        lane, place = divmod(place, self._share)
        segment = bisect.bisect_right(self._starts, step) - 1
        position = (step - self._starts[segment]) * self._share + place
        counts = self._counts[segment]
        if counts.count(0) == len(counts) - 1:
            part, rank = next(i for i, count in enumerate(counts) if count), position
        else:
            block, position = divmod(position, BLOCK)
            parts, ranks = _block(counts, (self._seed, lane, segment, block))
            part = int(parts[position])
            rank = block * counts[part] + int(ranks[position])
        return part, lane, self._before(lane, segment)[part] + rank

    def drawn(self, names: Sequence[str], records: Sequence[int], steps: int) -> list[Drawn]:
        """How often a run of some length sees what: nothing is repeated unsaid.

        Args:
            names: of the parts.
            records: each holds.
            steps: of the run.

        Returns:
            One entry per part.
        """
        total = np.zeros(len(names), np.int64)
        for segment, start in enumerate(self._starts):
            length = (min(self._end(segment), steps) - start) * self._share
            for lane in range(self.lanes) if length > 0 else ():
                total += self._drawn(lane, segment, length)
        return [
            Drawn(name, size, int(examples), int(examples) / size)
            for name, size, examples in zip(names, records, total)
        ]

    def _end(self, segment: int) -> int:
        return self._starts[segment + 1] if segment + 1 < len(self._starts) else 1 << 62

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (a mixture lives as long as its run)
    def _before(self, lane: int, segment: int) -> tuple[int, ...]:
        total = np.zeros(len(self._counts[0]), np.int64)
        for earlier in range(segment):
            length = (self._starts[earlier + 1] - self._starts[earlier]) * self._share
            total += self._drawn(lane, earlier, length)
        return tuple(int(count) for count in total)

    def _drawn(self, lane: int, segment: int, length: int) -> np.ndarray:
        counts = self._counts[segment]
        blocks, rest = divmod(length, BLOCK)
        parts, _ = _block(counts, (self._seed, lane, segment, blocks))
        return blocks * np.asarray(counts) + np.bincount(parts[:rest], minlength=len(counts))


def _weight_at(part: Sequence[tuple[int, float]], step: int) -> float:
    return [weight for start, weight in part if start <= step][-1]


def _apportion(weights: Sequence[float], step: int) -> tuple[int, ...]:
    """Whole numbers that add up to `BLOCK`: largest remainders, and at least 1 where not 0."""
    total = sum(weights)
    if total <= 0:
        raise ValueError(f"From step {step} on no part of data.mixture has a weight above 0.")
    exact = np.asarray(weights) / total * BLOCK
    counts = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    for i in range(BLOCK - int(counts.sum())):
        counts[order[i]] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()  # the ones given away for nothing
    return tuple(int(count) for count in counts)


@functools.lru_cache(maxsize=256)
def _block(counts: tuple[int, ...], key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of every place of a block: its part, and how many of that part came before it."""
    parts = np.random.default_rng(key).permutation(
        np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    )
    ranks = np.empty(BLOCK, np.int32)
    for part, count in enumerate(counts):
        ranks[parts == part] = np.arange(count)
    return parts, ranks
