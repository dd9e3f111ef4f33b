"""Crop, resize and mirror on the device, for hosts that should only decode.

The host sends each picture on a canvas of fixed size (`data_pipelines.image.canvas`) and the crop
it drew (`data_pipelines.image.crop_box`). Shapes are static, and the work is two small matrix
products a picture.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def crop_resize(
    canvas: UInt8[Array, "B C C 3"], box: Float[Array, "B 5"], size: int
) -> Float[Array, "B S S 3"]:
    """Cuts a box out of every canvas and resizes it, bicubic with antialiasing.

    The box is cut before it is resized, as on the host: pixels around it have no weight, which
    `jax.image.scale_and_translate` would give them. The kernel is PIL's (Keys, a = -0.5), widened
    where the box shrinks.

    Args:
        canvas: [B,C,C,3] uint8.
        box: [B,5] top, left, height and width in pixels of the canvas, and 1 for a mirror image.
        size: side S in pixels; static.

    Returns:
        [B,S,S,3] float32, whole numbers from 0 to 255.
    """
    return jax.vmap(lambda picture, b: _crop_resize(picture, b, size))(canvas, box)


def _crop_resize(canvas: Array, box: Array, size: int) -> Array:
    top, left, height, width, mirror = box
    rows = _weights(top, height, size, canvas.shape[0])  # S C
    columns = _weights(left, width, size, canvas.shape[1])  # S C
    columns = jnp.where(mirror > 0.5, columns[::-1], columns)
    pixels = canvas.astype(jnp.float32)
    # Products in bfloat16 would be off by up to one step of 255.
    out = jnp.einsum(
        "sh,hwc,tw->stc", rows, pixels, columns, precision="highest", optimize="optimal"
    )
    return jnp.clip(jnp.round(out), 0, 255)


def _weights(start: Array, length: Array, size: int, extent: int) -> Array:
    """[S,C]: what every pixel along an axis gives to every pixel of the result."""
    step = length / size
    center = start + (jnp.arange(size) + 0.5) * step - 0.5
    pixel = jnp.arange(extent)
    distance = jnp.abs(pixel - center[:, None]) / jnp.maximum(step, 1.0)
    inside = (pixel >= start) & (pixel < start + length)
    weights = jnp.where(inside, _keys(distance), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _keys(x: Array) -> Array:
    """Keys' cubic, a = -0.5 (IEEE Transactions on ASSP 29(6), 1981, equation 15)."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))
