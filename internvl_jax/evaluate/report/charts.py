"""Small SVG charts; their colours are CSS variables, so that they follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from internvl_jax.evaluate.report.markup import Markup, element, fragment

Points = Sequence[tuple[float, float]]


def curve(
    series: Mapping[str, Points],
    *,
    reference: tuple[str, float] | None = None,
    width: int = 240,
    height: int = 156,
) -> Markup:
    """Values over steps: the first series as a line over its raw points, the others dotted lines.

    Args:
        series: name -> (step, value) pairs; points that are no numbers are left out.
        reference: a named level, drawn as a dashed line where it falls into the range.
        width: of the drawing in its own pixels.
        height: the same.

    Returns:
        The SVG.
    """
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return element("p", "no points were logged", class_="quiet")
    values = [y for points in clean.values() for _, y in points]
    low, high = min(values), max(values)
    if reference is not None and low <= reference[1] <= high * 1.3:
        high = max(high, reference[1])
    last = max(x for points in clean.values() for x, _ in points)
    first = min(x for points in clean.values() for x, _ in points)
    marks = _ticks(low, high, 4)
    low, high = min(low, marks[0]), max(high, marks[-1])
    left, right, top, bottom = 24.0, width - 32.0, 8.0, height - 22.0

    def place_x(x: float) -> float:
        return left + (right - left) * (x - first) / max(last - first, 1)

    def place_y(y: float) -> float:
        return bottom - (bottom - top) * (y - low) / max(high - low, 1e-9)

    def line(points: Points, class_: str) -> Markup:
        text = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        return element("polyline", points=text, class_=class_)

    parts = []
    for mark in marks:
        y = place_y(mark)
        parts.append(
            element("line", x1=left, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
        )
        parts.append(_text(f"{mark:g}", left - 6, y + 3.5, "axis", "end"))
    for x, anchor in ((first, "start"), (last, "end")):
        parts.append(_text(f"{x:,.0f}", place_x(x), height - 6, "axis", anchor))
    parts.append(_text("step", (left + right) / 2, height - 6, "axis", "middle"))
    if reference is not None and low <= reference[1] <= high:
        y = f"{place_y(reference[1]):.1f}"
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="level"))
        parts.append(_text(reference[0], right, float(y) + 12, "axis", "end"))
    ends = []
    for place, points in enumerate(clean.values()):
        thin = _thinned(points)
        if place == 0:
            parts += [line(thin, "raw"), line(_smoothed(thin), "main")]
            end = _smoothed(thin)[-1][1]
        else:
            parts.append(line(thin, "other"))
            x, end = thin[-1]
            parts.append(
                element(
                    "circle", cx=f"{place_x(x):.1f}", cy=f"{place_y(end):.1f}", r=2.4, class_="dot"
                )
            )
        ends.append((place_y(end), end, "main-text" if place == 0 else "other-text"))
    for y, value, class_ in _apart(ends, 12.0):
        parts.append(_text(f"{value:.2f}", right + 6, y + 3.5, class_, "start"))
    label = "; ".join(
        f"{name}: {points[-1][1]:.3g} at step {points[-1][0]:g}" for name, points in clean.items()
    )
    return _svg(width, height, label, parts)


def bars(
    rows: Sequence[tuple[str, Mapping[str, float], float, float | None]],
    *,
    limit: float,
    width: int = 300,
    row_height: int = 36,
) -> Markup:
    """One row of bars per label, with the level of chance and a target as ticks.

    Args:
        rows: (label, series -> share, chance, target or None).
        limit: share at the right end.
        width: of the drawing in its own pixels.
        row_height: the same.

    Returns:
        The SVG.
    """
    left, right, head = 56.0, width - 28.0, 4.0
    height = head + row_height * len(rows) + 18

    def place(share: float) -> float:
        return left + (right - left) * min(max(share, 0.0), limit) / limit

    parts = []
    for mark in _ticks(0, limit, 3):
        if mark <= limit:
            x = f"{place(mark):.1f}"
            parts.append(element("line", x1=x, x2=x, y1=head, y2=height - 18, class_="grid"))
            parts.append(_text(f"{mark:g}", place(mark), height - 4, "axis", "middle"))
    for number, (label, series, chance, target) in enumerate(rows):
        top = head + number * row_height
        middle = top + row_height / 2 - 2
        parts.append(_text(label, 0, middle + 4, "label", "start"))
        thick = min(9.0, (row_height - 12) / max(len(series), 1))
        for place_, (name, share) in enumerate(series.items()):
            y = middle + (place_ - len(series) / 2) * (thick + 1)
            class_ = f"bar bar{place_}"
            bar = element(
                "rect",
                element("title", f"{label}, {name}: {share:.3f}"),
                x=left,
                y=f"{y:.1f}",
                width=f"{place(share) - left:.1f}",
                height=f"{thick:.1f}",
                class_=class_,
            )
            parts.append(bar)
            text = f"{share:.2f}" if share < 0.995 else "1.0"
            parts.append(
                _text(text, place(share) + 5, y + thick - 0.5, f"value value{place_}", "start")
            )
        for level, class_ in ((chance, "chance"), (target, "target")):
            if level is not None and level <= limit:
                x = f"{place(level):.1f}"
                y1, y2 = f"{middle - 11:.1f}", f"{middle + 11:.1f}"
                parts.append(element("line", x1=x, x2=x, y1=y1, y2=y2, class_=class_))
    label = "; ".join(
        f"{label}: " + ", ".join(f"{name} {share:.3f}" for name, share in series.items())
        for label, series, *_ in rows
    )
    return _svg(width, int(height), label, parts)


def _svg(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    return element(
        "svg",
        element("title", label),
        fragment(*parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
    )


def _text(text: str, x: float, y: float, class_: str, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, text_anchor=anchor)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values about the range, at least two."""
    span = max(high - low, 1e-6 * max(abs(high), 1e-6))
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    start, stop = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 10) for i in range(start, max(stop, start + 1) + 1)]


def _thinned(points: Points, most: int = 240) -> list[tuple[float, float]]:
    """At most so many points, each the mean of those it stands for."""
    if len(points) <= most:
        return list(points)
    groups = np.array_split(np.asarray(points, np.float64), most)
    return [(float(group[-1, 0]), float(group[:, 1].mean())) for group in groups]


def _smoothed(points: Points) -> list[tuple[float, float]]:
    """A centred mean over a twentieth of the points."""
    reach = len(points) // 40
    values = np.asarray([y for _, y in points])
    return [
        (x, float(values[max(0, i - reach) : i + reach + 1].mean()))
        for i, (x, _) in enumerate(points)
    ]


def _apart(ends: list[tuple[float, float, str]], gap: float) -> list[tuple[float, float, str]]:
    """Labels moved down until they do not overlap."""
    out: list[tuple[float, float, str]] = []
    for y, value, class_ in sorted(ends):
        y = max(y, out[-1][0] + gap) if out else y
        out.append((y, value, class_))
    return out
