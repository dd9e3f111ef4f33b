"""How a box becomes text.

LLaVA-1.5's, which the paper's dialogues follow: ``[x1, y1, x2, y2]``, top left and bottom right
corner, between 0 and 1, at most two decimals, no special tokens ("[0.7, 0.34, 0.88, 0.61]" in its
665K mixture). The unit is the side of the picture *padded to a square*, because that is what the
model sees (https://github.com/haotian-liu/LLaVA/issues/606); InternVL-Chat pads the same way. The
InternVL paper itself prints no box; InternVL 1.5 and later write integers up to 1000 of the
unpadded sides between <box> tags, which is not this.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.sample import BadRecordError

Box = tuple[float, float, float, float]


def normalise(
    box: Sequence[float], width: float, height: float, *, square: bool = True, place: str = "a box"
) -> Box:
    """A box in pixels as shares of the picture.

    Args:
        box: x1, y1, x2, y2 in pixels; what hangs over the edge is cut off.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        square: whether the picture will be padded to a square, itself in the middle.
        place: names the record in errors.

    Returns:
        x1, y1, x2, y2 in [0, 1].

    Raises:
        BadRecordError: if the picture has no size or nothing of the box lies in it.
    """
    if not (width > 0 and height > 0):
        raise BadRecordError("picture size", f"{place} has the picture size {width} x {height}.")
    x1, x2 = (min(max(float(x), 0.0), width) for x in (box[0], box[2]))
    y1, y2 = (min(max(float(y), 0.0), height) for y in (box[1], box[3]))
    if not (x2 > x1 and y2 > y1):
        raise BadRecordError(
            "empty box", f"{place} has the box {list(box)}, of which nothing lies in its picture."
        )
    if not square:
        return x1 / width, y1 / height, x2 / width, y2 / height
    side = max(width, height)
    # Whole pixels, as the padding itself.
    left, top = (side - width) // 2, (side - height) // 2
    return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side


def box_text(*boxes: Box) -> str:
    """Writes boxes.

    Args:
        boxes: in [0, 1].

    Returns:
        For one box "[0.7, 0.34, 0.88, 0.61]"; several are joined by ", ", as SVIT does.
    """
    return ", ".join(f"[{', '.join(str(round(value, 2)) for value in box)}]" for box in boxes)
