"""Pictures: safe decoding, resizing and the random crop of training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.sample import BadRecordError

MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class BadImageError(BadRecordError):
    """A picture that cannot or must not be decoded."""

    def __init__(self, message: str, reason: str = "broken"):
        super().__init__(reason, message)


def decode(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture to RGB, transparency composited on white.

    Args:
        data: an encoded picture of one of `FORMATS`.
        max_bytes: larger data is refused unread.
        max_pixels: a picture that declares more pixels is refused before they are decoded.

    Returns:
        [H,W,3] uint8.

    Raises:
        BadImageError: if the data is too large or no picture.
    """
    if len(data) > max_bytes:
        raise BadImageError(
            f"The picture has {len(data)} bytes, more than the {max_bytes} allowed."
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(
                    f"The picture has {image.width} x {image.height} pixels, more than the "
                    f"{max_pixels} allowed."
                )
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.array(image.convert("RGB"))
    except BadImageError:
        raise
    except Exception as error:  # decoders raise anything at all on broken data
        raise BadImageError(f"The picture cannot be decoded ({error}).") from error


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encodes pixels losslessly.

    Args:
        pixels: [H,W,3] uint8.

    Returns:
        PNG data.
    """
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def resize_square(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes to a square whatever the aspect (retrieval and captioning, spec §5).

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.

    Returns:
        [S,S,3] uint8, bicubic with antialiasing.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def resize_center(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes the shorter side and crops the centre (zero-shot classification, spec §5).

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.

    Returns:
        [S,S,3] uint8, bicubic with antialiasing.
    """
    height, width = pixels.shape[:2]
    # The longer side is truncated and the offsets rounded as torchvision does.
    if width <= height:
        new = (size, max(size, int(size * height / width)))
    else:
        new = (max(size, int(size * width / height)), size)
    image = Image.fromarray(pixels)
    if new != (width, height):
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    return np.array(image.crop((left, top, left + size, top + size)))


RESIZES = {"square": resize_square, "center": resize_center}


def random_resized_crop(
    pixels: UInt8[np.ndarray, "H W 3"],
    size: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float] = (0.5, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
) -> UInt8[np.ndarray, "S S 3"]:
    """Inception's random crop, as torchvision draws it, and an optional mirror image.

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.
        rng: source of randomness; the draws do not depend on ``size``.
        scale: least and greatest share of the area.
        ratio: least and greatest width / height, drawn evenly in the logarithm.
        flip: chance of mirroring.

    Returns:
        [S,S,3] uint8, bicubic with antialiasing.
    """
    height, width = pixels.shape[:2]
    left, top, crop_width, crop_height = _crop_box(height, width, rng, scale, ratio)
    mirror = rng.random() < flip
    image = Image.fromarray(pixels[top : top + crop_height, left : left + crop_width])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    out = np.array(image)
    return out[:, ::-1] if mirror else out


def _crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, crop_width, crop_height
    # No draw fitted: the largest central crop within the ratios.
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
