"""A decoder's vocabulary with more words than it was trained with."""

from __future__ import annotations

import numpy as np


def grown(table: np.ndarray, rows: int, axis: int) -> np.ndarray:
    """Adds words to an embedding or a head, each of them the mean of the old ones.

    As the released code of the family does it when special tokens are added.

    Args:
        table: the embedding [V, D] or the head [D, V].
        rows: the new V.
        axis: which axis is V.

    Returns:
        The larger table, in its dtype; the mean is taken in float32.
    """
    mean = np.mean(table, axis=axis, keepdims=True, dtype=np.float32).astype(table.dtype)
    new = np.repeat(mean, rows - table.shape[axis], axis=axis)
    return np.concatenate([table, new], axis=axis)
