"""The matrix product of a linear layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def dense(x: jax.Array, kernel: jax.Array, *, contract: int = 1) -> jax.Array:
    """Multiplies the last axes of x with the first axes of a kernel.

    Args:
        x: [..., *in], with `contract` axes `in`.
        kernel: [*in, *out]; taken in x's dtype.

    Returns:
        [..., *out] in x's dtype.
    """
    return _dense(contract, x, kernel.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(contract: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=contract)


def _forward(contract: int, x: Any, kernel: Any):
    # A frozen kernel needs no x, an input that nothing depends on no kernel.
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _dense(contract, x.value, kernel.value), kept


def _backward(contract: int, kept: tuple[jax.Array | None, jax.Array | None], dy: Any):
    """What differentiation finds, with the sum over rows written per platform."""
    x, kernel = kept
    dx = dkernel = None
    if isinstance(dy, SymbolicZero):
        return dx, dkernel
    if kernel is not None:
        inputs = tuple(range(dy.ndim - kernel.ndim + contract, dy.ndim))
        outputs = tuple(range(contract, kernel.ndim))
        dx = lax.dot_general(dy, kernel, ((inputs, outputs), ((), ())))
    if x is not None:
        rows = x.ndim - contract
        # Over several axes of rows, XLA's CPU backend copies an operand transposed, and a SwiGLU's
        # backward pass takes three times as long; on a TPU it is flattening that costs a copy.
        dkernel = lax.platform_dependent(
            x,
            dy,
            cpu=lambda *terms: _sum_rows(*(t.reshape(-1, *t.shape[rows:]) for t in terms), rows=1),
            default=lambda *terms: _sum_rows(*terms, rows=rows),
        )
    return dx, dkernel


def _sum_rows(x: jax.Array, dy: jax.Array, rows: int) -> jax.Array:
    """[*rows, *in], [*rows, *out] -> [*in, *out]."""
    axes = tuple(range(rows))
    return lax.dot_general(x, dy, ((axes, axes), ((), ())))


_dense.defvjp(_forward, _backward, symbolic_zeros=True)
