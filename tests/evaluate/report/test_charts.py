"""Charts: well-formed, with the values they were given at the places they belong."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from internvl_jax.evaluate.report.charts import _thinned, _ticks, bars, curve


def lines(svg, class_):
    found = [e for e in ET.fromstring(svg).iter("polyline") if e.get("class") == class_]
    points = [e.get("points") for e in found]
    return [[tuple(map(float, p.split(","))) for p in text.split()] for text in points]


def test_a_falling_loss_falls_in_the_drawing():
    svg = curve(
        {"training": [(i, 10.0 - i) for i in range(10)], "validation": [(5, 5.0), (9, 3.0)]}
    )
    (raw,), (main,), (other,) = (lines(svg, c) for c in ("raw", "main", "other"))
    assert len(raw) == len(main) == 10 and len(other) == 2
    assert [y for _, y in raw] == sorted(y for _, y in raw)  # down is larger
    assert raw[5][0] == pytest.approx(other[0][0])
    assert raw[5][1] == pytest.approx(other[0][1])
    texts = [e.text for e in ET.fromstring(svg).iter("text")]
    assert {"0", "9", "3.00"} <= set(texts)


def test_points_that_are_no_numbers_are_left_out():
    svg = curve({"training": [(0, 2.0), (1, float("nan")), (2, float("inf")), (3, 1.0)]})
    assert len(lines(svg, "raw")[0]) == 2 and "nan" not in svg
    assert "no points were logged" in curve({"training": []})


def test_a_level_is_drawn_where_it_fits():
    points = {"training": [(0, 4.9), (10, 1.0)]}
    assert "guessing" in curve(points, reference=("guessing", 4.85))
    assert "guessing" not in curve(points, reference=("guessing", 400.0))


def test_bars_are_as_long_as_their_shares():
    svg = bars([("English", {"one": 0.2, "two": 0.4}, 0.1, 0.3)], limit=0.5, width=300)
    one, two = (float(e.get("width")) for e in ET.fromstring(svg).iter("rect"))
    assert two == pytest.approx(2 * one, abs=0.1) and one > 10
    marks = {e.get("class"): float(e.get("x1")) for e in ET.fromstring(svg).iter("line")}
    start = next(float(e.get("x")) for e in ET.fromstring(svg).iter("rect"))
    assert marks["chance"] - start == pytest.approx(one / 2, abs=0.1)
    assert marks["target"] - start == pytest.approx(1.5 * one, abs=0.1)


@pytest.mark.parametrize("low,high", [(0, 1), (0.13, 0.14), (2.1, 8.3), (0, 1e-9), (5, 5), (-3, 4)])
def test_ticks_are_round_and_enclose_the_range(low, high):
    marks = _ticks(low, high, 4)
    assert marks[0] <= low + 1e-6 and marks[-1] >= high - 1e-6 and 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))


def test_thinning_keeps_the_mean_and_the_end():
    points = [(i, float(i % 7)) for i in range(1000)]
    thin = _thinned(points, 100)
    assert len(thin) == 100 and thin[-1][0] == 999
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
