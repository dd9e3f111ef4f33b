"""Sums and gathers over a global batch, of which each device may hold a shard."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Axes = tuple[str, ...]


def gather(x: Array, axes: Axes) -> Array:
    """All shards' rows, in global order.

    Args:
        x: this shard's rows, [b, ...].
        axes: mesh axes that the rows are sharded over, major first; () on one device.

    Returns:
        [B, ...]; its gradient is summed over the shards.
    """
    return lax.all_gather(x, axes, tiled=True) if axes else x


def shard_sum(x: Array, axes: Axes) -> Array:
    """Sum of each shard's `x`."""
    return lax.psum(x, axes) if axes else x


def own_rows(rows: int, axes: Axes) -> Int[Array, "b"]:
    """Global indices (int32) of this shard's rows."""
    first = lax.axis_index(axes) * rows if axes else 0
    return jnp.arange(rows, dtype=jnp.int32) + first


def weighted_sum(
    x: Float[Array, "b"], weights: Float[Array, "b"] | None, axes: Axes = ()
) -> Float[Array, ""]:
    """Sum of `x` times `weights` over the global batch; without weights, the mean.

    Rows of weight 0 are left out even where `x` is not finite.
    """
    if weights is None:
        return lax.pmean(jnp.mean(x), axes) if axes else jnp.mean(x)
    return shard_sum(jnp.sum(jnp.where(weights != 0, x * weights, 0.0)), axes)


def varying(x: Array, axes: Axes) -> Array:
    """A value equal on all shards, typed as differing: what a scan's carry must start as.

    Of a parameter, it places the sum of its gradient over the shards here.
    """
    return lax.pcast(x, axes, to="varying") if axes else x
