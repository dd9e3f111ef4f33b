"""Room for new tokens in a decoder that is taken over from elsewhere."""

from __future__ import annotations

import numpy as np


def grown(table: np.ndarray, rows: int, axis: int) -> np.ndarray:
    """A table of embeddings, or an output head, with entries for new tokens at its end.

    A new entry is the mean of the old ones, as the InternVL family adds its special tokens: the
    decoder then finds them neither likely nor far from what it has read. Entries that belong to no
    token (tables are often padded) are to be cut off before, or they count as old ones.

    Args:
        table: of which one axis runs over the vocabulary; any floating dtype.
        rows: entries afterwards.
        axis: the vocabulary's.

    Returns:
        The same dtype; the old entries bit for bit, then the new ones: their mean as float32, cast
        back.

    Raises:
        ValueError: if the table has no entry yet or more than `rows`.
    """
    old = table.shape[axis]
    if not 0 < old <= rows:
        raise ValueError(
            f"A vocabulary of {old} entries cannot grow to {rows}: cut the table, or ask for more."
        )
    # Summed in float64: in float32, 150,000 rows one after the other lose the last digits.
    mean = table.mean(axis=axis, dtype=np.float64, keepdims=True)
    mean = mean.astype(np.float32).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - old, axis=axis)], axis=axis)
