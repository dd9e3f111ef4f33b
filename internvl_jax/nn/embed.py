"""Patch embedding and position tables."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.nn.param import Initializer, param, zeros


class PatchEmbed(nnx.Module):
    """A strided convolution, written as one matrix product over flattened patches."""

    def __init__(self, patch: int, width: int, *, rngs: nnx.Rngs, init: Initializer):
        self.kernel = param(rngs, (patch, patch, 3, width), (None, None, None, "embed"), init)
        self.bias = param(rngs, (width,), ("embed",), zeros)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, h*p, w*p, 3] float -> [B, h*w, D], row-major. Raises ValueError on other sizes."""
        p = self.kernel.shape[0]
        B, height, width, channels = images.shape
        if height % p or width % p or channels != 3:
            raise ValueError(
                f"Images of shape {height}x{width}x{channels} do not split into {p}x{p} RGB "
                f"patches: resize them to a multiple of {p}."
            )
        x = images.reshape(B, height // p, p, width // p, p, 3)
        y = jnp.einsum("BhpwqC,pqCD->BhwD", x, self.kernel[...].astype(images.dtype))
        y = y + self.bias[...].astype(images.dtype)
        return y.reshape(B, -1, y.shape[-1])


@functools.lru_cache(maxsize=64)
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """One axis of torch's bicubic ``interpolate(align_corners=False)`` as a matrix.

    Keys' kernel with a = -0.75, source coordinate (i + 0.5) * source / target - 0.5, taps outside
    clamped to the border, no antialiasing. `jax.image.resize` uses another kernel and border.

    Returns:
        float32 [target, source]; the identity where the sizes agree.
    """
    a = -0.75
    coordinate = (np.arange(target) + 0.5) * source / target - 0.5
    base = np.floor(coordinate).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        distance = np.abs(coordinate - (base + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = np.where(distance <= 1, near, far)
        np.add.at(matrix, (np.arange(target), np.clip(base + tap, 0, source - 1)), weight)
    return matrix.astype(np.float32)


def resize_positions(table: Any, grid: tuple[int, int]) -> Any:
    """Interpolates a position table to another grid, the CLS row untouched.

    Args:
        table: [1 + G*G, D], CLS first; of numpy, and then no device is touched, or jax.
        grid: rows and columns of the target, not necessarily square.

    Returns:
        [1 + rows * columns, D] float32, of numpy or jax as the table.
    """
    source = round((table.shape[0] - 1) ** 0.5)
    if source * source != table.shape[0] - 1:
        raise ValueError(
            f"A position table of {table.shape[0]} rows is not CLS plus a square grid."
        )
    if grid == (source, source):
        return table
    rows, columns = (bicubic_matrix(source, n) for n in grid)
    square = table[1:].astype(np.float32).reshape(source, source, -1)
    product = "hr,wc,rcD->hwD"
    if isinstance(table, np.ndarray):
        resized = np.einsum(product, rows, columns, square, optimize=True)
    else:
        resized = jnp.einsum(product, rows, columns, square, precision="highest")
    np_ = np if isinstance(table, np.ndarray) else jnp
    return np_.concatenate([table[:1].astype(np.float32), resized.reshape(-1, table.shape[1])])
