"""Rotary position embedding, half-split as in LLaMA (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every position.

    Args:
        positions: [B, T] integer or float positions (fractions are allowed, as V2PE needs).
        head_dim: H, even.
        theta: base of the geometric frequencies.

    Returns:
        Two float32 arrays [B, T, 1, H/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H/2]) of [B, T, N, H]."""
    cos, sin = (t.astype(x.dtype) for t in tables)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
