"""Parameters that carry the logical name of each of their axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[..., jax.Array]

zeros = nnx.initializers.zeros
ones = nnx.initializers.ones


def normal(stddev: float) -> Initializer:
    """Truncated normal (two standard deviations), the initialisation of BEiT and ViT."""
    return nnx.initializers.truncated_normal(stddev)


def kernel_init(width: int) -> Initializer:
    """Initialisation of the matrices of a transformer of some width.

    BEiT's 0.02 at InternViT-6B's width of 3,200, growing as width^-1/2 for narrower models, so that
    activations start at the same size in a small model as in the large one. The released code has
    no initialisation that works; this one is ours.
    """
    return normal(0.02 * (3200 / width) ** 0.5)


def constant(value: float) -> Initializer:
    """Every entry the same."""
    return nnx.initializers.constant(value)


def param(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], init: Initializer
) -> nnx.Param:
    """A float32 parameter whose axes are named.

    Args:
        rngs: supplies the ``params`` stream.
        shape: true shape, without any stacked layer axis.
        axes: one logical name (or None) per axis; `sharding.rules` says where each one lives.
        init: ``init(key, shape, dtype)``.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"A parameter of shape {tuple(shape)} needs {len(shape)} axis names, got {tuple(axes)}."
        )
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axis names of a parameter, None for the stacked layer axis where there is one."""
    axes = variable.get_metadata().get("axes", ())
    return (None,) * (variable.get_value().ndim - len(axes)) + tuple(axes)
