"""The report as one page without anything beside it."""

from __future__ import annotations

import html
from typing import Any

_COLOURS = (
    *("#8c564b", "#d62728", "#ff7f0e", "#bcbd22", "#1f77b4", "#9467bd", "#e377c2", "#17becf"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#7f7f7f"),
)
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { color: GrayText; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.bar { width: 34%; min-width: 12rem; } tr.all td { font-weight: 600; }
.track { display: flex; height: 1rem; background: var(--soft); border-radius: 3px; }
.track { position: relative; overflow: hidden; }
.track i { display: block; height: 100%; }
.track b { position: absolute; top: 0; bottom: 0; width: 2px; background: CanvasText; }
.scroll { overflow-x: auto; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; display: flex; gap: .7rem; align-items: center; }
summary::before { content: "\\25b8"; color: GrayText; }
details[open] summary::before { content: "\\25be"; }
summary i { width: .8rem; height: .8rem; border-radius: 2px; flex: none; }
summary span { margin-left: auto; font-variant-numeric: tabular-nums; color: GrayText; }
td, .n { font-variant-numeric: tabular-nums; }
ul { margin: .3rem 0 .6rem 1.2rem; padding-left: 1rem; } li { overflow-wrap: anywhere; }
li small { color: GrayText; }
"""
_LONGEST = 200


def make_page(report: dict[str, Any]) -> str:
    """The page.

    Args:
        report: see `report.make_report`.

    Returns:
        HTML, all texts escaped.
    """
    sources = report["sources"]
    whole = sources["all"]
    reasons = sorted(whole["dropped"], key=lambda reason: -whole["dropped"][reason])
    colours = {reason: _COLOURS[i % len(_COLOURS)] for i, reason in enumerate(reasons)}
    rows = "".join(_row(name, entry, colours) for name, entry in sources.items())
    groups = "".join(_group(reason, sources, colours[reason], whole["rows"]) for reason in reasons)
    kept = _group("kept", sources, "#2ca02c", whole["rows"]) if whole["kept"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Cleaning, stage {report["stage"]}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>Cleaning for stage {report["stage"]}</h1>
<p>{whole["kept"]:,} of {whole["rows"]:,} pairs kept &middot; settings {report["settings"]}</p>
<h2>By source</h2>
<div class="scroll"><table><thead><tr><th>source</th><th>rows</th><th>kept</th><th>rate</th>
<th>paper</th><th>kept (green) and dropped by reason; the line is the paper&rsquo;s rate</th></tr>
</thead><tbody>{rows}</tbody></table></div>
<p>The paper&rsquo;s rates are those of its Table 2 and include failed downloads.</p>
<h2>By reason</h2>
<p>A row counts for the first reason that applies. Captions below are unedited samples.</p>
{groups}{kept}
</body></html>
"""


def _share(count: float | None, total: float = 1) -> str:
    return "&ndash;" if count is None or not total else f"{100 * count / total:.1f}&nbsp;%"


def _row(name: str, entry: dict[str, Any], colours: dict[str, str]) -> str:
    total = entry["rows"] or 1
    pieces = [("kept", entry["kept"], "#2ca02c")]
    pieces += [(r, entry["dropped"][r], c) for r, c in colours.items() if r in entry["dropped"]]
    bar = "".join(
        f'<i style="width:{100 * count / total:.3f}%;background:{colour}" '
        f'title="{reason}: {count:,}"></i>'
        for reason, count, colour in pieces
    )
    if entry["paper"] is not None:
        bar += f'<b style="left:{100 * entry["paper"]:.2f}%"></b>'
    return (
        f'<tr class="{"all" if name == "all" else ""}"><td>{html.escape(name)}</td>'
        f"<td>{entry['rows']:,}</td><td>{entry['kept']:,}</td><td>{_share(entry['rate'])}</td>"
        f'<td>{_share(entry["paper"])}</td><td class="bar"><div class="track">{bar}</div></td></tr>'
    )


def _group(reason: str, sources: dict[str, Any], colour: str, total: int) -> str:
    whole = sources["all"]
    count = whole["kept"] if reason == "kept" else whole["dropped"][reason]
    items = ""
    for name, entry in sources.items():
        if name == "all":
            continue
        for text in entry["examples"].get(reason, ()):
            short = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
            items += f"<li><bdi>{html.escape(short)}</bdi> <small>{html.escape(name)}</small></li>"
    return (
        f'<details><summary><i style="background:{colour}"></i>{reason.replace("_", " ")}'
        f"<span>{count:,} &middot; {_share(count, total)}</span></summary>"
        f"<ul>{items}</ul></details>"
    )
