"""Splitting a global batch so that every device keeps its own rows."""

from __future__ import annotations

from typing import Any

import jax


def split(batch: Any, n: int) -> Any:
    """[B, ...] -> [n, B/n, ...]; microbatch j holds examples j, j + n, j + 2n, ..."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)


def join(parts: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
