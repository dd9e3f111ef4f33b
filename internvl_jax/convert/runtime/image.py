"""Picture files -> pixels as the model was trained: safe decoding, then one of three resizes.

Of a picture counts the first frame, upright by its EXIF orientation, on white where it is
transparent, as RGB; 16 bits per channel are scaled to 8. Refused are data of more than `MAX_BYTES`,
pictures that declare more than `MAX_PIXELS` (before they are decoded), truncated and broken ones,
and what is none of `FORMATS`. Resizing is Pillow's antialiased bicubic.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import torch
from torch import Tensor

from .config import ImageConfig

MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
STRIP = 16
"""Aspects beyond this are cut before a central crop."""


class PictureError(ValueError):
    """Data that is no picture or too large; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the model sees it: uint8 [S, S, 3], and its size as it came."""

    pixels: np.ndarray
    width: int
    height: int


def picture(
    data: bytes, config: ImageConfig, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Decodes and resizes.

    Args:
        data: an encoded picture.
        config: how the model was trained.
        max_bytes, max_pixels: larger pictures are refused.

    Raises:
        PictureError: if the data is too large or no picture.
    """
    pixels = decode(data, max_bytes=max_bytes, max_pixels=max_pixels)
    height, width = pixels.shape[:2]
    return Picture(resize(pixels, config), width, height)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded picture -> uint8 [H, W, 3]; see the module. Raises PictureError."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > max_bytes:
        raise PictureError(f"The picture has {len(data)} bytes, more than the {max_bytes} allowed.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PictureError(
                    f"The picture has {image.width} x {image.height} pixels, more than the "
                    f"{max_pixels} allowed."
                )
            return _upright(_rgb(image), _orientation(image))
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"The data is no readable picture of {', '.join(FORMATS)}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"The picture is too large ({error}).") from None
    except Exception as error:  # decoders raise anything at all on broken data
        said = error or type(error).__name__
        raise PictureError(f"The picture cannot be decoded ({said}).") from None


def _rgb(image) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _orientation(image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a picture with broken EXIF is still a picture
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes EXIF's orientation: 5 to 8 are stored transposed, the rest is mirrored axes."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def resize(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [H, W, 3] -> [S, S, 3].

    ``squash`` ignores the aspect, ``crop`` resizes the shorter side and cuts out the centre,
    ``pad`` makes a square with the mean colour first.
    """
    return {"squash": _bicubic_square, "crop": _crop, "pad": _pad}[config.resize](pixels, config)


def _bicubic(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def _bicubic_square(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    return _bicubic(pixels, config.size, config.size)


def _crop(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    size = config.size
    # The ends of long strips are cut off first: resized whole they could be gigabytes.
    height, width = min(pixels.shape[0], STRIP * pixels.shape[1]), pixels.shape[1]
    width = min(width, STRIP * height)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    pixels = pixels[top : top + height, left : left + width]
    if width <= height:
        new_width, new_height = size, max(size, int(size * height / width))
    else:
        new_width, new_height = max(size, int(size * width / height)), size
    pixels = _bicubic(pixels, new_width, new_height)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return pixels[top : top + size, left : left + size]


def _pad(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    size = config.size
    height, width = pixels.shape[:2]
    side = max(height, width)
    if side * side > MAX_PIXELS:  # the square of a long strip would not fit: shrink before padding
        width, height = (max(1, round(n * size / side)) for n in (width, height))
        pixels, side = _bicubic(pixels, width, height), size
    if height != width:
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(255 * channel) for channel in config.mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return _bicubic(pixels, size, size)


def normalize(pixels: Tensor, config: ImageConfig) -> Tensor:
    """uint8 [..., S, S, 3] -> float32, by mean and standard deviation, on the pixels' device."""
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=pixels.device) * 255.0
        for v in (config.mean, config.std)
    )
    return (pixels.float() - mean) / std
