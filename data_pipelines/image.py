"""Pictures: safe decoding, resizing and the random crop of training.

What becomes of what is found in a corpus:

================================  ==================================================================
JPEG, also progressive or grey    libjpeg-turbo, bit for bit what PIL gives
CMYK or YCCK JPEG                 converted to RGB by PIL's formula, without colour profiles
PNG, WebP, GIF, BMP               PIL; of several frames the first
EXIF orientation                  applied; unreadable EXIF counts as upright
palette, grey, 1 bit              RGB
transparency of any kind          composited on white
16 bits per channel               the high byte of each: scaled, not clipped
1 × 1                             as any other
more than `MAX_BYTES`,            refused before decoding: "too large". Below, pictures are decoded
more than `MAX_PIXELS`            whole (40 megapixels are 120 MB for as long as they are held)
ends early                        refused: "truncated", also where an end mark was put back
known signature, bad content      refused: "broken"
empty, SVG, HTML, TIFF, …         refused: "not a picture"
================================  ==================================================================

Everything that resizes takes ``resample``: "exact" is PIL's antialiased bicubic, which published
figures are made with; "fast" is the same filter with vector instructions, 4 to 7 times as fast and
within 0.3 of 255 on average; without cykooz.resizer it is "exact". Both release the GIL.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from data_pipelines.sample import BadRecordError
from internvl_jax.batch import MEAN

try:
    import cykooz_resizer as fast
except ImportError:  # there are no wheels for Linux on Arm
    fast = None

MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MEAN_COLOR = tuple(int(255 * channel) for channel in MEAN)
"""What pads pictures to squares."""

START_OF_SCAN = b"\xff\xda"
STRIP = 16
"""Aspects beyond this are cut before a central crop."""

Resample = Literal["fast", "exact"]


class BadImageError(BadRecordError):
    """A picture that cannot or must not be decoded.

    Its reason is "truncated", "too large", "not a picture" or "broken".
    """


def decode(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture to RGB, upright, on white; see the table above.

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
            "too large", f"The picture has {len(data)} bytes, more than the {max_bytes} allowed."
        )
    try:
        pixels = _decode_jpeg(data, max_pixels) if data.startswith(b"\xff\xd8") else None
        if pixels is None:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width, image.height, max_pixels)
                pixels = _rgb(image)
        elif b"Exif\0\0" not in data[: data.find(START_OF_SCAN)]:
            return pixels
        return _upright(pixels, _orientation(data))
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too large", f"The picture is too large ({error}).") from error
    except UnidentifiedImageError as error:
        raise BadImageError(
            _reason(data), f"The data is no readable picture of {', '.join(FORMATS)}."
        ) from error
    except Exception as error:  # decoders raise anything at all on broken data
        raise BadImageError(
            _reason(data), f"The picture cannot be decoded ({error or type(error).__name__})."
        ) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(
            "too large",
            f"The picture has {width} x {height} pixels, more than the {max_pixels} allowed.",
        )


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels as stored; None where PIL must look."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height), max_pixels)
        return None if colors in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data, "RGB")
    except BadImageError:
        raise
    except ValueError as error:
        # Half a picture is grey below; other complaints, such as stray bytes, cost no pixels or
        # are PIL's to judge.
        if "premature end" in str(error).lower():
            raise BadImageError("truncated", f"The picture cannot be decoded ({error}).") from error
        return None


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
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


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _reason(data: bytes) -> str:
    """Why data that could not be decoded is bad: by its first bytes and its last."""
    if data.startswith(b"\xff\xd8"):
        whole = b"\xff\xd9" in data[-1024:]
    elif data.startswith(b"\x89PNG"):
        whole = b"IEND" in data[-64:]
    elif data.startswith(b"GIF8"):
        whole = data.rstrip(b"\0").endswith(b";")
    elif data.startswith(b"RIFF"):
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    elif data.startswith(b"BM"):
        whole = len(data) >= int.from_bytes(data[2:6], "little")
    else:
        return "not a picture"
    return "broken" if whole else "truncated"


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


_THREAD = threading.local()  # holds a resizer and its result, which threads must not share


def _resize(pixels: np.ndarray, width: int, height: int, resample: Resample) -> np.ndarray:
    if resample not in ("fast", "exact"):
        raise ValueError(f'resample is {resample!r}; choose "fast" or "exact".')
    old_height, old_width = pixels.shape[:2]
    if (old_width, old_height) == (width, height):
        return pixels
    if resample == "exact" or fast is None:
        image = Image.fromarray(pixels)
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    if not hasattr(_THREAD, "resizer"):
        _THREAD.resizer, _THREAD.target = fast.Resizer(), None
        # The name of Keys' cubic with a = -0.5, which is PIL's.
        cubic = fast.ResizeAlg.convolution(fast.FilterType.catmull_rom)
        _THREAD.options = fast.ResizeOptions(cubic)
    source = fast.ImageData(old_width, old_height, fast.PixelType.U8x3, pixels.tobytes())
    target = _THREAD.target
    if target is None or (target.width, target.height) != (width, height):
        target = _THREAD.target = fast.ImageData(width, height, fast.PixelType.U8x3)
    _THREAD.resizer.resize(source, target, _THREAD.options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)


def resize_square(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, resample: Resample = "fast"
) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes to a square whatever the aspect (retrieval and captioning, spec §5).

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.
        resample: "fast" or "exact".

    Returns:
        [S,S,3] uint8, bicubic with antialiasing; not to be written to.
    """
    return _resize(pixels, size, size, resample)


def resize_center(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, resample: Resample = "fast"
) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes the shorter side and crops the centre (zero-shot classification, spec §5).

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.
        resample: "fast" or "exact".

    Returns:
        [S,S,3] uint8, bicubic with antialiasing; not to be written to.
    """
    # The ends of long strips are cut off first: resized whole they could be gigabytes.
    height, width = min(pixels.shape[0], STRIP * pixels.shape[1]), pixels.shape[1]
    width = min(width, STRIP * height)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    pixels = pixels[top : top + height, left : left + width]
    # The longer side is truncated and the offsets rounded as torchvision does.
    if width <= height:
        new_width, new_height = size, max(size, int(size * height / width))
    else:
        new_width, new_height = max(size, int(size * width / height)), size
    pixels = _resize(pixels, new_width, new_height, resample)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return pixels[top : top + size, left : left + size]


def resize_pad(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, resample: Resample = "fast"
) -> UInt8[np.ndarray, "S S 3"]:
    """Pads to a square with the mean colour, then resizes (chat, spec §5; LLaVA's "pad").

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.
        resample: "fast" or "exact".

    Returns:
        [S,S,3] uint8, bicubic with antialiasing; not to be written to.
    """
    height, width = pixels.shape[:2]
    side = max(height, width)
    if side * side > MAX_PIXELS:  # the square of a long strip would not fit: shrink before padding
        shrink = size / side
        width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
        pixels, side = _resize(pixels, width, height, resample), size
    if height != width:
        square = np.empty((side, side, 3), np.uint8)
        square[:] = MEAN_COLOR
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return _resize(pixels, size, size, resample)


RESIZES = {"square": resize_square, "center": resize_center, "pad": resize_pad}


def random_resized_crop(
    pixels: UInt8[np.ndarray, "H W 3"],
    size: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float] = (0.5, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    resample: Resample = "fast",
) -> UInt8[np.ndarray, "S S 3"]:
    """Inception's random crop, as torchvision draws it, and an optional mirror image.

    Args:
        pixels: [H,W,3] uint8.
        size: side S in pixels.
        rng: source of randomness; the draws do not depend on ``size``.
        scale: least and greatest share of the area.
        ratio: least and greatest width / height, drawn evenly in the logarithm.
        flip: chance of mirroring.
        resample: "fast" or "exact".

    Returns:
        [S,S,3] uint8, bicubic with antialiasing; not to be written to.
    """
    old_height, old_width = pixels.shape[:2]
    box, mirror = _draw(old_height, old_width, rng, scale, ratio, flip)
    top, left, height, width = box
    out = _resize(pixels[top : top + height, left : left + width], size, size, resample)
    return out[:, ::-1] if mirror else out


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float] = (0.5, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
) -> Float32[np.ndarray, "5"]:
    """Draws the crop of `random_resized_crop`, for `internvl_jax.crop.crop_resize` on the device.

    Args:
        height: of the picture in pixels.
        width: of the picture in pixels.
        rng: source of randomness.
        scale: least and greatest share of the area.
        ratio: least and greatest width / height, drawn evenly in the logarithm.
        flip: chance of mirroring.

    Returns:
        [5] float32: top, left, height and width in whole pixels, and 1 for a mirror image.
    """
    box, mirror = _draw(height, width, rng, scale, ratio, flip)
    return np.asarray([*box, mirror], np.float32)


def _draw(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: Sequence[float],
    ratio: Sequence[float],
    flip: float,
) -> tuple[tuple[int, int, int, int], bool]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # One call for all four: a call costs more than its numbers.
        share, aspect, down, across = rng.random(4).tolist()
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect * (high - low))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(down * (height - crop_height + 1))
            left = int(across * (width - crop_width + 1))
            break
    else:  # no draw fitted: the largest central crop within the ratios
        crop_width = min(width, max(1, round(height * ratio[1])))
        crop_height = min(height, max(1, round(width / ratio[0])))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return (top, left, crop_height, crop_width), bool(rng.random() < flip)


def canvas(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, resample: Resample = "fast"
) -> tuple[UInt8[np.ndarray, "C C 3"], tuple[int, int]]:
    """Puts a picture on a canvas of fixed size, for cropping on the device.

    A picture larger than the canvas is shrunk to fit it.

    Args:
        pixels: [H,W,3] uint8.
        size: side C of the canvas in pixels.
        resample: "fast" or "exact", where it must shrink.

    Returns:
        [C,C,3] uint8 with the picture at the top left and black elsewhere, and the (height, width)
        of the picture there, which `crop_box` takes.
    """
    height, width = pixels.shape[:2]
    shrink = min(1.0, size / max(height, width))
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    out = np.zeros((size, size, 3), np.uint8)
    out[:height, :width] = _resize(pixels, width, height, resample)
    return out, (height, width)
