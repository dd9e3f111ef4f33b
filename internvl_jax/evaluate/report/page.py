"""The page: sections one after another, written to one file."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

from internvl_jax.batch import LANGUAGES
from internvl_jax.evaluate.report import charts, examples
from internvl_jax.evaluate.report.content import Bars, Claim, Report
from internvl_jax.evaluate.report.markup import Child, Markup, element, fragment
from internvl_jax.evaluate.report.style import CSS


def write_report(path: str | os.PathLike, report: Report) -> pathlib.Path:
    """Writes the page, replacing an older one at once.

    Args:
        path: of the HTML file; its folder is made.
        report: what it says.

    Returns:
        The path.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}.tmp")
    writing.write_text(render(report), "utf-8")
    os.replace(writing, path)
    return path


def render(report: Report) -> str:
    """The page as HTML.

    Args:
        report: what it says.

    Returns:
        A whole document that loads nothing and runs nothing.
    """
    sections = (
        _scorecard(report),
        _curves(report),
        _bars(report),
        examples.names_of_pictures(report.retrieval.get("pictures", ())),
        examples.pictures_of_names(report.retrieval.get("names", ())),
        examples.captions(report.captions),
        examples.dialogues(report.dialogues),
        _limits(report),
        _commands(report),
        _figures(report),
        _attribution(report),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", report.title),
        element("style", Markup(CSS)),
    )
    facts = [
        element("div", element("dt", label), element("dd", value))
        for label, value in report.facts.items()
    ]
    header = element(
        "header",
        element("p", "InternVL in JAX", class_="over"),
        element("h1", report.title),
        element("p", report.summary, class_="lead"),
        element("dl", facts, class_="facts", style=_columns(len(facts))) if facts else None,
    )
    body = element("body", header, element("main", *sections), element("footer", _FOOTER))
    return "<!doctype html>\n" + element("html", head, body, lang="en")


_FOOTER = "Made by internvl_jax.evaluate.report. The page holds all it shows and loads nothing."


def _columns(count: int) -> str:
    """As many columns as fill whole rows, so that none stands alone."""
    return f"--columns: {next((n for n in (6, 5, 4, 3) if count % n == 0), min(count, 4))}"


def _section(title: str, intro: str | None, *children: Child) -> Markup:
    lead = element("p", intro, class_="intro") if intro else None
    return element("section", element("h2", title), lead, *children)


def _scorecard(report: Report) -> Markup | None:
    if not report.claims:
        return None
    columns = list(dict.fromkeys(column for claim in report.claims for column in claim.cells))
    head = ["", *(LANGUAGES.get(column, column.capitalize()) for column in columns)]
    rows = [_claim(claim, columns) for claim in report.claims]
    table = element(
        "table",
        element("thead", element("tr", [element("th", title) for title in head])),
        element("tbody", rows),
        class_="card",
    )
    met = sum(claim.verdict() == "met" for claim in report.claims)
    intro = (
        f"{met} of {len(report.claims)} targets met. Figures are shares of all cases; under each "
        "stands what it is to be compared with."
    )
    return _section(
        "What was to be reached, and what was", intro, element("div", table, class_="scroll")
    )


def _claim(claim: Claim, columns: Sequence[str]) -> Markup:
    cells = []
    for column in columns:
        cell = claim.cells.get(column)
        if cell is None:
            cells.append(element("td"))
        elif cell.value is None:
            cells.append(element("td", element("span", "–", class_="num quiet")))
        else:
            number = element(
                "span", f"{cell.value:.3f}", class_="num off" if cell.met is False else "num"
            )
            cells.append(element("td", number, element("small", cell.beside)))
    verdict = claim.verdict()
    mark = element("span", verdict, class_=f"verdict {verdict.split()[0]}")
    head = element(
        "th",
        claim.title,
        element("small", claim.detail),
        element("small", f"Target: {claim.target} ", mark),
    )
    return element("tr", head, cells)


def _curves(report: Report) -> Markup | None:
    if not report.curves:
        return None
    figures = [
        element(
            "figure",
            element("figcaption", element("h3", curve.title), curve.caption),
            charts.curve(curve.series, reference=curve.reference),
        )
        for curve in report.curves
    ]
    names = list(dict.fromkeys(name for curve in report.curves for name in curve.series))
    key = element(
        "ul",
        element("li", _swatch("main"), names[0] if names else ""),
        element("li", _swatch("other"), " / ".join(names[1:])) if names[1:] else None,
        element("li", _swatch("level"), "level named in the chart")
        if any(curve.reference for curve in report.curves)
        else None,
        class_="key",
    )
    intro = (
        "The loss of every stage over its steps: faint as logged, strong as a running mean, whose "
        "last value stands at the end."
    )
    return _section("Learning", intro, key, element("div", figures, class_="multiples curves"))


def _bars(report: Report) -> Markup | None:
    if not report.bars:
        return None
    key = element(
        "ul",
        [element("li", _block(place), name) for place, name in enumerate(report.legend)],
        element("li", _swatch("chance"), "chance"),
        element("li", _swatch("target"), "target of stage 1"),
        class_="key",
    )
    figures = [_bar_figure(bars) for bars in report.bars]
    intro = (
        "A picture by an artist whose drawings were never trained on; is its name among the ten "
        "best of all names on the list?"
    )
    return _section(
        "Finding the name of a picture", intro, key, element("div", figures, class_="multiples")
    )


def _bar_figure(bars: Bars) -> Markup:
    reach = [
        level
        for _, series, chance, target in bars.rows
        for level in (*series.values(), chance, target or 0.0)
    ]
    limit = min(1.0, 1.12 * max(reach, default=1.0))
    return element(
        "figure",
        element("figcaption", element("h3", bars.title), bars.caption),
        charts.bars(bars.rows, limit=limit),
    )


def _swatch(class_: str) -> Markup:
    vertical = class_ in ("chance", "target")
    ends = (
        {"x1": 9, "x2": 9, "y1": 0, "y2": 14} if vertical else {"x1": 0, "x2": 18, "y1": 7, "y2": 7}
    )
    return element(
        "svg", element("line", class_=class_, **ends), width=18, height=14, class_="chart-key"
    )


def _block(place: int) -> Markup:
    rect = element("rect", x=0, y=3, width=18, height=8, class_=f"bar{place}")
    return element("svg", rect, width=18, height=14, class_="chart-key")


def _limits(report: Report) -> Markup | None:
    if not report.limits:
        return None
    items = element("ul", [element("li", text) for text in report.limits], class_="limits")
    return _section("What this does not show", None, items)


def _commands(report: Report) -> Markup | None:
    if not report.commands and not report.versions:
        return None
    commands = [(element("h3", what), element("pre", command)) for what, command in report.commands]
    versions = [
        element("li", element("span", name), element("span", version))
        for name, version in report.versions.items()
    ]
    listed = element("ul", versions, class_="versions") if versions else None
    return _section(
        "Doing it again", "The commands of this run, and what it ran on.", commands, listed
    )


def _figures(report: Report) -> Markup | None:
    if not report.figures:
        return None
    items = [
        element("li", element("span", name), element("span", f"{value:.6g}"))
        for name, value in report.figures.items()
    ]
    summary = element("summary", f"All {len(items):,} figures, as in metrics.json")
    return _section(
        "Every figure", None, element("details", summary, element("ul", items, class_="every"))
    )


def _attribution(report: Report) -> Markup | None:
    if not report.attribution.strip():
        return None
    intro = "As the file beside the data has it."
    return _section("Whose pictures and names these are", intro, *_markdown(report.attribution))


def _markdown(text: str) -> list[Markup]:
    """Paragraphs, tables and <links> of Markdown; headings are left out, the page has its own."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.strip().splitlines()
        if lines[0].startswith("#"):
            continue
        if lines[0].startswith("|"):
            rows = [
                [_linked(cell.strip()) for cell in line.strip().strip("|").split("|")]
                for line in lines
            ]
            body = [element("tr", [element("td", cell) for cell in row]) for row in rows[2:]]
            head = element("tr", [element("th", cell) for cell in rows[0]])
            table = element("table", element("thead", head), element("tbody", body), class_="plain")
            out.append(element("div", table, class_="scroll"))
        else:
            out.append(element("p", _linked(" ".join(lines)), class_="fine"))
    return out


def _linked(text: str) -> Markup:
    parts = re.split(r"<(https?://[^>\s]+)>", text)
    return fragment(
        *(element("a", part, href=part) if i % 2 else part for i, part in enumerate(parts))
    )
