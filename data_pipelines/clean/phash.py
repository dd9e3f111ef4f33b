"""The perceptual hash of a picture: the signs of its lowest frequencies.

The usual DCT hash (C. Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010) in the form that COYO's `image_phash` and the package ImageHash have, bit by bit.
"""

from __future__ import annotations

import functools

import numpy as np

_SIDE, _KEPT = 32, 8


def phash(pixels: np.ndarray) -> int:
    """Hashes a picture; small changes of size, quality and brightness change few bits.

    Args:
        pixels: [H,W,3] or [H,W] uint8.

    Returns:
        64 bits; the first row of frequencies is the most significant byte.
    """
    from PIL import Image

    small = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    waves = _waves()
    low = waves @ np.asarray(small, np.float64) @ waves.T
    # What is rounding must not decide: in a picture of one colour all but the mean is zero.
    low[np.abs(low) < 1e-6] = 0
    bits = np.packbits(low.ravel() > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


@functools.cache
def _waves() -> np.ndarray:
    """The first rows of the cosine transform (DCT-II), [8,32]."""
    angle = np.pi * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    return 2 * np.cos(np.arange(_KEPT)[:, None] * angle)
