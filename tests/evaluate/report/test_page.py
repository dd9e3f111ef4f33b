"""The page: it holds what it was given, loads nothing, and escapes what a model says."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import re

import pytest

from data_pipelines.datasets import open_dataset
from internvl_jax.evaluate.report import Cell, Claim, Curve, Report, render, write_report
from internvl_jax.evaluate.report.demo import demo_report, make_claims, minutes, read_curve
from internvl_jax.evaluate.report.markup import element

LANGUAGES = ("en", "ar")


def made_up_figures(i2t: float = 0.25) -> dict[str, float]:
    """Figures that no model reached, for the page alone."""
    out: dict[str, float] = {}
    for suffix in ("", "_unseen"):
        for code in LANGUAGES:
            for stage, value in (("stage1", i2t), ("stage2", 0.3125)):
                prefix = f"{stage}.fluent{suffix}.{code}"
                out |= {f"{prefix}.i2t_R@10": value, f"{prefix}.chance_R@10": 0.0125}
                out |= {f"{prefix}.ratio_R@10": value / 0.0125}
                out |= {f"{prefix}.n": 801.0, f"{prefix}.names": 800.0}
    for scope in ("fluent", "fluent.en", "fluent.ar"):
        out |= {f"stage2.{scope}.itm_accuracy": 0.875, f"stage2.{scope}.itm_chance": 0.5}
        out |= {f"stage3.{scope}.which_accuracy": 0.75, f"stage3.{scope}.which_chance": 0.5}
    return out | {"stage2.fluent.itm_n": 3204.0, "stage3.fluent.which_n": 1602.0}


def made_up_examples() -> dict:
    png = base64.b64encode(open_dataset("shapes").pictures[0]).decode("ascii")
    hostile = "<script>alert('x')</script>\x07"
    entry = {"language": "en", "rank": 1, "right": "cat"}
    arabic = {"language": "ar", "rank": 23, "right": "قطة"}
    names = [{"text": "cat", "right": True}, {"text": hostile, "right": False}]
    others = [{"text": "كلب", "right": False}]
    found = [{"image": png, "right": True}, {"image": png, "right": False}]
    shown = {"image": png, "name": "cat"}
    caption = {"language": "en", "text": hostile, "right": "cat", "verdict": ""}
    turn = {"language": "ar", "question": "Is this قطة?", "answer": "No", "right": "Yes"}
    return {
        "stage1": {
            "pictures": [
                shown | {"languages": [entry | {"names": names}, arabic | {"names": others}]}
            ],
            "names": [{"text": "قطة", "language": "ar", "rank": 1, "pictures": found}],
        },
        "stage2": {"captions": [shown | {"captions": [caption]}]},
        "stage3": {"dialogues": [shown | {"turns": [turn | {"correct": False}]}]},
    }


@pytest.fixture(scope="module")
def page() -> str:
    report = demo_report(
        made_up_figures(),
        made_up_examples(),
        curves=[Curve("Stage 1", "made up", {"training": [(0, 5.0), (10, 1.25)]})],
        facts={"Trained for": "never", "On": "nothing"},
        training="Made-up figures for a test of the page.",
        commands=[("All of it", "make demo")],
        attribution="# Title\n\n| what | by |\n| --- | --- |\n| drawings | <https://example.org> |",
        languages=LANGUAGES,
    )
    return render(report)


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed in order, and collects texts and addresses."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def parsed(page) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    return parser


def test_the_page_is_whole_and_loads_nothing(page, parsed):
    assert page.startswith("<!doctype html>") and not parsed.open
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert all(
        a.startswith(("data:image/png;base64,", "https://example.org")) for a in parsed.addresses
    )
    assert "@import" not in page and not re.search(r"url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_the_figures_stand_beside_chance_and_target(page):
    for text in ("0.250", "20.0 × chance", "15 × chance in every language", "stage 1: 0.250"):
        assert text in page
    assert "801 pictures, 800 names a language, chance 0.0125" in page
    assert "3,204 pairs" in page and "1,602 questions" in page
    assert "3 of 4 targets met" in page and page.count(">missed<") == 1
    assert "stage1.fluent.ar.ratio_R@10" in page and "0.3125" in page
    assert "0.015" in page  # standard error of 0.25 on 801 pictures


def test_examples_are_shown_in_their_own_direction(page):
    assert '<li lang="en" dir="auto" class="right">cat</li>' in page
    assert "23. قطة" in page and '<td dir="rtl">' in page
    assert "should be" in page and 'class="tile right"' in page


def test_what_a_model_says_is_text(page):
    assert "<script" not in page and "&lt;script&gt;" in page and "\x07" not in page
    assert element("p", "a < b & c", title='"') == '<p title="&quot;">a &lt; b &amp; c</p>'


def test_missing_figures_are_said_to_be_missing():
    claims = make_claims({}, LANGUAGES, "fluent")
    assert [claim.verdict() for claim in claims] == ["not measured"] * 4
    page = render(demo_report({}, {}, languages=LANGUAGES))
    assert page.count("not measured") == 4 and "0 of 4 targets met" in page
    assert "From picture to name" not in page
    some = {k: v for k, v in made_up_figures().items() if ".ar." not in k}
    assert make_claims(some, LANGUAGES, "fluent")[0].verdict() == "not measured"


@pytest.mark.parametrize("value,verdicts", [(0.1875, "met"), (0.18, "missed")])
def test_a_target_is_met_only_where_it_is_reached(value, verdicts):
    figures = made_up_figures() | {
        "stage1.fluent.ar.i2t_R@10": value,
        "stage1.fluent.ar.ratio_R@10": value / 0.0125,
    }
    assert make_claims(figures, LANGUAGES, "fluent")[0].verdict() == verdicts


def test_stage_2_must_not_fall_below_stage_1():
    claims = make_claims(made_up_figures(i2t=0.33), LANGUAGES, "fluent")
    assert claims[0].verdict() == "met" and claims[1].verdict() == "missed"


def test_a_report_of_nothing_but_words_can_be_written(tmp_path):
    report = Report(title="Title", summary="Words.")
    path = write_report(tmp_path / "runs" / "report.html", report)
    assert "Words." in path.read_text("utf-8") and list(path.parent.iterdir()) == [path]
    again = dataclasses.replace(report, claims=[Claim("a", "b", "c", {"en": Cell(0.5, "d", True)})])
    assert "0.500" in write_report(path, again).read_text("utf-8")


def test_curves_are_read_from_the_log(tmp_path):
    lines = [
        {"step": 10, "train/loss": 4.0, "train/lr": 1.0},
        {"step": 20, "train/loss": "nan"},
        {"step": 20, "validation/loss": 3.5},
        {"step": 30, "train/loss": 2.0},
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "tr'
    (tmp_path / "metrics.jsonl").write_text(log)
    curve = read_curve(tmp_path, "Stage 1", caption="a loss")
    assert [x for x, _ in curve.series["training"]] == [10, 20, 30]
    assert curve.series["validation"] == [(20, 3.5)]
    assert "2.00" in render(Report(title="t", summary="s", curves=[curve]))
    assert read_curve(tmp_path / "absent", "none").series == {}


def test_minutes():
    assert [minutes(s) for s in (48.2, 420, 7500)] == ["48 s", "7 min", "2 h 5 min"]
