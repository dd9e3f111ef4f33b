"""Drop path, dropout and token masking, keyed by (step, layer, global example).

Each example draws from its own key, so gradient caching, accumulation and any number of hosts see
the same randomness as one plain batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Randomness(NamedTuple):
    """What a training pass draws from: a key of the step and the global example indices."""

    key: jax.Array
    example: jax.Array

    def fold(self, part: int | jax.Array) -> Randomness:
        """Another key for a part of the model; the examples stay."""
        return Randomness(jax.random.fold_in(self.key, part), self.example)

    def rows(self, count: int) -> Randomness:
        """Where every example has `count` consecutive rows."""
        example = self.example[:, None] * count + jnp.arange(count)
        return Randomness(self.key, example.reshape(-1))


def example_keys(key: jax.Array, example: jax.Array) -> jax.Array:
    """One key per example; `example` [B] is the index within the global batch."""
    return jax.vmap(lambda e: jax.random.fold_in(key, e))(example)


def drop_path(x: jax.Array, rate: jax.Array, key: jax.Array, example: jax.Array) -> jax.Array:
    """Drops the whole residual branch of an example with probability `rate`.

    Args:
        x: [B, ...] branch output.
        rate: scalar probability.
        key: PRNG key of this step, layer and branch.
        example: [B] global example indices.

    Returns:
        x scaled by 1 / (1 - rate) where kept, zero elsewhere (https://arxiv.org/abs/1603.09382).
    """
    keep = jax.vmap(lambda k: jax.random.uniform(k))(example_keys(key, example)) >= rate
    factor = jnp.where(keep, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)
    return x * factor.reshape(-1, *(1,) * (x.ndim - 1))


def dropout(x: jax.Array, rate: float, random: Randomness, shape: tuple[int, ...]) -> jax.Array:
    """Zeroes single entries with probability `rate`.

    Args:
        x: [B, ...].
        rate: probability.
        random: of this step, layer and kernel.
        shape: x's true shape without B; what x was padded with beyond it is kept.

    Returns:
        x scaled by 1 / (1 - rate) where kept, zero elsewhere.
    """
    draw = lambda key: jax.random.bernoulli(key, 1.0 - rate, shape)
    keep = jax.vmap(draw)(example_keys(random.key, random.example))
    more = [(0, n - m) for n, m in zip(x.shape, keep.shape, strict=True)]
    if any(n for _, n in more):
        keep = jnp.pad(keep, more, constant_values=True)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def keep_tokens(x: jax.Array, keep: int, key: jax.Array, example: jax.Array) -> jax.Array:
    """Keeps a random subset of the patch tokens and really drops the others (FLIP).

    Args:
        x: [B, P, D] patch tokens without CLS.
        keep: number of tokens to keep per example.
        key: PRNG key of this step.
        example: [B] global example indices.

    Returns:
        [B, keep, D] (https://arxiv.org/abs/2212.00794).
    """
    if not 0 < keep <= x.shape[1]:
        raise ValueError(f"Cannot keep {keep} of {x.shape[1]} tokens.")
    order = jax.vmap(lambda k: jax.random.permutation(k, x.shape[1])[:keep])(
        example_keys(key, example)
    )
    return jnp.take_along_axis(x, order[..., None], axis=1)
