"""Draws the shapes and names them; the same set on every machine, without a download."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.datasets import Concept, Dataset
from data_pipelines.image import encode_png
from data_pipelines.sources.memory import MemorySource

# In Italian and Arabic the colour follows the shape.
COLOURS = {
    "red": ((214, 40, 40), {"zh": "红色", "ja": "赤い", "ar": "أحمر", "it": "rosso"}),
    "green": ((40, 160, 60), {"zh": "绿色", "ja": "緑の", "ar": "أخضر", "it": "verde"}),
    "blue": ((40, 70, 210), {"zh": "蓝色", "ja": "青い", "ar": "أزرق", "it": "blu"}),
    "yellow": ((240, 200, 30), {"zh": "黄色", "ja": "黄色い", "ar": "أصفر", "it": "giallo"}),
    "black": ((20, 20, 20), {"zh": "黑色", "ja": "黒い", "ar": "أسود", "it": "nero"}),
    "violet": ((140, 50, 170), {"zh": "紫色", "ja": "紫の", "ar": "بنفسجي", "it": "viola"}),
}
SHAPES = {
    "circle": (40, {"zh": "圆形", "ja": "円", "ar": "دائرة", "it": "cerchio"}),
    "triangle": (3, {"zh": "三角形", "ja": "三角形", "ar": "مثلث", "it": "triangolo"}),
    "square": (4, {"zh": "正方形", "ja": "正方形", "ar": "مربع", "it": "quadrato"}),
    "pentagon": (5, {"zh": "五边形", "ja": "五角形", "ar": "خماسي", "it": "pentagono"}),
    "hexagon": (6, {"zh": "六边形", "ja": "六角形", "ar": "سداسي", "it": "esagono"}),
    "star": (-5, {"zh": "星形", "ja": "星", "ar": "نجمة", "it": "stella"}),
}
# vendor -> (radius as a share of the picture, turn in degrees, width of the outline or 0)
VENDORS = {"plain": (0.42, 0, 0), "small": (0.28, 20, 0), "outline": (0.4, 45, 6)}
HELD_OUT_VENDOR = ("turned", (0.36, 75, 0))
SIZE = 64


@functools.cache
def make_concepts() -> tuple[Concept, ...]:
    """The 36 concepts; every ninth is unseen, the rest are judged.

    Returns:
        The table of concepts.
    """
    concepts = []
    for shape, (_, shape_names) in SHAPES.items():
        for colour, (_, colour_names) in COLOURS.items():
            names = {"en": f"{colour} {shape}"}
            keywords = {"en": (colour, shape)}
            for language, name in shape_names.items():
                tint = colour_names[language]
                order = f"{name} {tint}" if language in ("ar", "it") else f"{tint}{name}"
                names[language], keywords[language] = order, (tint, name)
            unseen = len(concepts) % 9 == 4
            concepts.append(
                Concept(f"{colour}-{shape}", shape, names, keywords, unseen, not unseen)
            )
    return tuple(concepts)


def draw(concept: Concept, vendor: str) -> np.ndarray:
    """Draws one concept in one vendor's manner.

    Args:
        concept: from `make_concepts`.
        vendor: key of `VENDORS`, or the held-out vendor.

    Returns:
        [64,64,3] uint8.
    """
    radius, turn, outline = {**VENDORS, HELD_OUT_VENDOR[0]: HELD_OUT_VENDOR[1]}[vendor]
    colour, shape = concept.key.split("-")
    rgb, corners = COLOURS[colour][0], SHAPES[shape][0]
    count = corners if corners > 0 else -2 * corners
    points = []
    for i in range(count):
        reach = radius * SIZE * (0.45 if corners < 0 and i % 2 else 1.0)
        angle = math.radians(turn - 90) + 2 * math.pi * i / count
        points.append((SIZE / 2 + reach * math.cos(angle), SIZE / 2 + reach * math.sin(angle)))
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    if outline:
        pen.line([*points, points[0], points[1]], fill=rgb, width=outline, joint="curve")
    else:
        pen.polygon(points, fill=rgb)
    return np.array(image)


def make_records() -> dict[str, list[tuple[int, str]]]:
    """Which drawings belong to which split.

    Returns:
        split -> (concept number, vendor) of its records.
    """
    records: dict[str, list[tuple[int, str]]] = {
        split: [] for split in ("train", "validation", "unseen", "held_out")
    }
    for number, concept in enumerate(make_concepts()):
        for place, vendor in enumerate(VENDORS):
            kept_back = number % 6 == 2 and place == number // 6 % len(VENDORS)
            split = "unseen" if concept.unseen else "validation" if kept_back else "train"
            records[split].append((number, vendor))
        records["held_out"].append((number, HELD_OUT_VENDOR[0]))
    return records


@functools.cache
def make_dataset() -> Dataset:
    """The whole set, in memory.

    Returns:
        The set "shapes".
    """
    concepts, records = make_concepts(), make_records()
    flat = [record for split in records.values() for record in split]
    splits, end = {}, 0
    for split, part in records.items():
        splits[split] = np.arange(end, end + len(part), dtype=np.int64)
        end += len(part)
    return Dataset(
        name="shapes",
        pictures=MemorySource([encode_png(draw(concepts[c], vendor)) for c, vendor in flat]),
        concept=np.asarray([c for c, _ in flat], np.int32),
        vendor=tuple(vendor for _, vendor in flat),
        concepts=concepts,
        splits=splits,
    )
