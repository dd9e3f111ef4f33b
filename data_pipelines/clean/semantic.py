"""Near-duplicates by embedding, as an option: ``python -m data_pipelines.clean.semantic --help``.

SemDeDup (https://arxiv.org/abs/2303.09540): k-means first, then cosines within each cluster; of
pairs above a threshold the later one goes. Embeddings are the user's (of CLIP, SSCD, …): .npy files
[n,E] with .npy files of uids beside them, row by row. The list of uids that this writes is what
`config.drop_uids` takes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import numpy as np

_BLOCK = 1024  # rows of a cluster that are compared at a time
_SAMPLE = 256  # rows per cluster that the centres are learnt from


def find_near(
    embeddings: np.ndarray, threshold: float, clusters: int, *, rounds: int = 10, seed: int = 0
) -> np.ndarray:
    """Rows that are near an earlier row of their cluster.

    Args:
        embeddings: [n,E] floats, of any length; may be a memory map.
        threshold: least cosine of near rows.
        clusters: of the k-means; about the square root of n is a good number.
        rounds: of the k-means.
        seed: of its first centres.

    Returns:
        [n] bool, true where a row is to be dropped.
    """
    count = len(embeddings)
    clusters = min(clusters, count)
    rng = np.random.default_rng(seed)
    sample = rng.choice(count, min(count, clusters * _SAMPLE), replace=False)
    points = _unit(embeddings[np.sort(sample)])
    centres = points[rng.choice(len(points), clusters, replace=False)]
    for _ in range(rounds):
        nearest = _nearest(points, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        empty = np.bincount(nearest, minlength=clusters) == 0
        centres = np.where(empty[:, None], centres, _unit(sums))
    member = np.concatenate(
        [_nearest(_unit(embeddings[i : i + 65536]), centres) for i in range(0, count, 65536)]
    )
    dropped = np.zeros(count, bool)
    for cluster in range(clusters):
        rows = np.flatnonzero(member == cluster)
        points = _unit(embeddings[rows])
        for start in range(0, len(rows), _BLOCK):
            stop = min(start + _BLOCK, len(rows))
            cosines = points[start:stop] @ points[:stop].T
            earlier = np.arange(stop) < np.arange(start, stop)[:, None]
            dropped[rows[start:stop]] = ((cosines >= threshold) & earlier).any(axis=1)
    return dropped


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    blocks = range(0, len(points), 8192)
    return np.concatenate([np.argmax(points[i : i + 8192] @ centres.T, axis=1) for i in blocks])


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 done, 78 something is missing or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.clean.semantic",
        description="Writes uids of near-duplicates by embedding, for config.drop_uids.",
    )
    parser.add_argument("--embeddings", type=pathlib.Path, required=True, help=".npy [n,E]")
    parser.add_argument("--uids", type=pathlib.Path, required=True, help=".npy [n], as cleaning's")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine (ours)")
    parser.add_argument("--clusters", type=int, default=0, help="default: the square root of n")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="e.g. near.npy")
    options = parser.parse_args(arguments)
    try:
        embeddings = np.load(options.embeddings, mmap_mode="r", allow_pickle=False)
        uids = np.load(options.uids, allow_pickle=False)
        if embeddings.ndim != 2 or len(embeddings) != len(uids):
            raise ValueError(
                f"{options.embeddings} is {embeddings.shape}, {options.uids} {uids.shape}: "
                "give [n,E] and [n]."
            )
        clusters = options.clusters or max(1, round(len(uids) ** 0.5))
        dropped = find_near(embeddings, options.threshold, clusters)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 78
    writing = options.out.with_suffix(".tmp")
    with open(writing, "wb") as file:
        np.save(file, uids[dropped], allow_pickle=False)
    os.replace(writing, options.out)
    print(f"{options.out}: {np.count_nonzero(dropped)} of {len(uids)} are near an earlier one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
