"""Made pictures in tars as img2dataset writes them."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import numpy as np

SHARD = 500
WORDS = (
    "a",
    "the",
    "red",
    "small",
    "old",
    "dog",
    "cat",
    "house",
    "street",
    "on",
    "in",
    "near",
    "of",
)


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with the 1/f spectrum of photos, their correlated colours, and edges.

    Args:
        rng: source of randomness.
        height: in pixels.
        width: in pixels.

    Returns:
        [height,width,3] uint8.
    """
    from PIL import Image, ImageDraw

    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def noise(power: float) -> np.ndarray:
        spectrum = rng.standard_normal((*frequency.shape, 2)) @ (1, 1j) / frequency**power
        field = np.fft.irfft2(spectrum, (height, width))
        return field / field.std()

    light, warm, green = noise(1.0), noise(1.3), noise(1.3)
    channels = (light + 0.5 * warm, light - 0.2 * warm - 0.2 * green, light + 0.5 * green)
    image = Image.fromarray(np.clip(120 + 45 * np.stack(channels, -1), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(12):
        color = (*rng.integers(0, 256, 3).tolist(), int(rng.integers(120, 256)))
        corners = rng.random((3, 2)) * (width, height)
        if rng.random() < 0.5:
            draw.polygon([tuple(c) for c in corners.tolist()], fill=color)
        else:
            low, high = corners[:2].min(axis=0), corners[:2].max(axis=0)
            draw.ellipse((*low.tolist(), *high.tolist()), fill=color)
    return np.asarray(image)


def write_shards(folder: pathlib.Path, pictures: int, side: int) -> None:
    """Writes tars as img2dataset does: a JPEG, a text and a JSON for every key.

    Args:
        folder: where to; it is made.
        pictures: how many.
        side: of each in pixels.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    each = min(SHARD, -(-pictures // 2))  # two tars at least, for two workers
    for start in range(0, pictures, each):
        with tarfile.open(folder / f"{start // each:05}.tar", "w") as tar:
            for number in range(start, min(start + each, pictures)):
                rng = np.random.default_rng((side, number))
                jpeg = io.BytesIO()
                image = Image.fromarray(photo(rng, side, side))
                image.save(jpeg, "JPEG", quality=int(rng.integers(80, 94)))
                caption = " ".join(rng.choice(WORDS, 10))
                meta = {"caption": caption, "width": side, "height": side, "status": "success"}
                files = (("jpg", jpeg.getvalue()), ("txt", caption), ("json", json.dumps(meta)))
                for suffix, content in files:
                    data = content if isinstance(content, bytes) else content.encode()
                    info = tarfile.TarInfo(f"{start // each:05}{number - start:04}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
