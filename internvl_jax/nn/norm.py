"""Normalisation in float32, whatever the compute dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.nn.param import ones, param, zeros


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a per-channel scale.

    With a tuple shape ``(N, H)`` the mean runs over all heads together: InternViT's QK-norm is a
    norm over the full width (https://arxiv.org/abs/2312.14238, A.1), not one per head. The mean's
    divisor is the true width even where heads were padded for tensor parallelism.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        eps: float,
        rngs: nnx.Rngs,
        axes: tuple[str | None, ...] = ("embed",),
    ):
        shape = (shape,) if isinstance(shape, int) else shape
        self.scale = param(rngs, shape, axes, ones)
        self.eps = eps
        self.reduce = tuple(range(-len(shape), 0))
        self.count = 1
        for size in shape:
            self.count *= size

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = jnp.sum(jnp.square(x32), self.reduce, keepdims=True) / self.count
        return (x32 * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype) * self.scale[...].astype(
            x.dtype
        )


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias over the last axis."""

    def __init__(
        self, width: int, *, eps: float, rngs: nnx.Rngs, axes: tuple[str | None, ...] = ("embed",)
    ):
        self.scale = param(rngs, (width,), axes, ones)
        self.bias = param(rngs, (width,), axes, zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def make_norm(kind: str, width: int, *, eps: float, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """``rms`` or ``layer``, by the names the configs use."""
    if kind == "rms":
        return RMSNorm(width, eps=eps, rngs=rngs)
    if kind == "layer":
        return LayerNorm(width, eps=eps, rngs=rngs)
    raise ValueError(f"Unknown norm {kind!r}: use 'rms' or 'layer'.")
