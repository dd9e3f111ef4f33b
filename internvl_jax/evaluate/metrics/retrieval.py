"""Retrieval: where the best right target ranks, recall at k, and what chance would reach.

A query and a target belong together where their labels are equal; a query may have several right
targets, and is a hit at k if one of them is among the k best (spec of CLIP's and BLIP's scorers).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 1 << 22
"""Scores held at a time: 16 MiB in float32."""


def ranks(
    queries: np.ndarray,
    targets: np.ndarray,
    query_labels: np.ndarray,
    target_labels: np.ndarray,
    *,
    chunk: int = CHUNK,
) -> np.ndarray:
    """Rank of the best right target of every query, by dot product.

    A wrong target that scores as high as the best right one stands before it, and so does one whose
    score is not a number: a model that gives everything the same score hits nothing.

    Args:
        queries: float [N, E].
        targets: float [M, E].
        query_labels: int [N].
        target_labels: int [M].
        chunk: most scores held at a time (at least one row of M).

    Returns:
        int64 [N], 1 is best.

    Raises:
        ValueError: if a query has no right target.
    """
    orphans = np.flatnonzero(~np.isin(query_labels, target_labels))
    if orphans.size:
        raise ValueError(
            f"Query {orphans[0]} (label {query_labels[orphans[0]]}) has no right target: leave it "
            "out, or add its target."
        )
    out = np.empty(len(queries), np.int64)
    for rows in _rows(len(queries), len(targets), chunk):
        scores = queries[rows] @ targets.T
        right = query_labels[rows, None] == target_labels
        # fmax passes over NaN where another right target has a score.
        best = np.fmax.reduce(np.where(right, scores, -np.inf), axis=1)
        out[rows] = 1 + np.count_nonzero(~right & ~(scores < best[:, None]), axis=1)
    return out


def recall(ranks: np.ndarray, k: int) -> float:
    """Share of queries with a right target among the k best.

    Args:
        ranks: [N] from `ranks`.
        k: how many targets are looked at.
    """
    return float(np.mean(ranks <= k))


def chance_recall(query_labels: np.ndarray, target_labels: np.ndarray, k: int) -> float:
    """Expected `recall` of a random order of the targets.

    Args:
        query_labels: int [N].
        target_labels: int [M].
        k: how many targets are looked at.

    Returns:
        The mean over queries of 1 - C(M - c, k) / C(M, k), c right targets each.
    """
    M = len(target_labels)
    labels, counts = np.unique(target_labels, return_counts=True)
    place = np.clip(np.searchsorted(labels, query_labels), 0, len(labels) - 1)
    right = np.where(labels[place] == query_labels, counts[place], 0)
    drawn = np.arange(min(k, M))
    missed = np.prod(np.maximum(M - right[:, None] - drawn, 0) / (M - drawn), axis=1)
    return float(np.mean(1 - missed))


def top(
    queries: np.ndarray, targets: np.ndarray, k: int, *, chunk: int = CHUNK
) -> tuple[np.ndarray, np.ndarray]:
    """The k best targets of every query.

    Args:
        queries: float [N, E].
        targets: float [M, E].
        k: how many; fewer if there are not as many targets.
        chunk: most scores held at a time (at least one row of M).

    Returns:
        indices int64 [N, k] and scores [N, k], best first; of equal scores the first target.
    """
    k = min(k, len(targets))
    indices = np.empty((len(queries), k), np.int64)
    best = np.empty((len(queries), k), np.result_type(queries, targets))
    for rows in _rows(len(queries), len(targets), chunk):
        scores = queries[rows] @ targets.T
        indices[rows] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best[rows] = np.take_along_axis(scores, indices[rows], axis=1)
    return indices, best


def _rows(queries: int, targets: int, chunk: int) -> Iterator[slice]:
    step = max(1, chunk // max(targets, 1))
    return (slice(start, start + step) for start in range(0, queries, step))
