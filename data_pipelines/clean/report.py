"""What was kept and what was dropped for which reason, beside the paper's figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from data_pipelines.clean.config import CleanConfig
from data_pipelines.clean.folder import Folder
from data_pipelines.clean.page import make_page
from data_pipelines.clean.rules import REASONS

PAPER = {
    "laion_en": (2.3e9, 1.94e9, 91e6),
    "laion_coco": (663e6, 550e6, 550e6),
    "coyo": (747e6, 535e6, 200e6),
    "cc12m": (12.4e6, 11.1e6, 11.1e6),
    "cc3m": (3.0e6, 2.6e6, 2.6e6),
    "sbu": (1.0e6, 1.0e6, 1.0e6),
    "wukong": (100e6, 69.4e6, 69.4e6),
    "laion_multi": (2.2e9, 1.87e9, 100e6),
    "all": (6.03e9, 4.98e9, 1.03e9),
}
"""Table 2 of https://arxiv.org/abs/2312.14238: pairs as published, in stage 1, in stage 2. Failed
downloads are among what the paper lost."""

EXAMPLES = 6


def make_report(config: CleanConfig, folder: Folder) -> dict[str, Any]:
    """Adds up the counts of all parts and writes report.json and report.html.

    Args:
        config: of the run.
        folder: of the output, complete.

    Returns:
        {"stage", "settings" (their digest), "sources": {name: {"rows", "kept", "rate", "paper",
        "dropped": {reason: rows}, "examples": {reason: captions}}}}, with the source "all" last.
    """
    parts = [folder.read_json(name) for name in folder.names("counts/*.json")]
    sources = {}
    for name in config.order:
        sources[name] = _add([p for p in parts if p["source"] == name], name, config.stage)
    whole = _add(parts, "all", config.stage)
    known = [PAPER[name] for name in config.order if name in PAPER]
    if set(config.order) != set(PAPER) - {"all"}:  # the paper's rate of as many sources
        whole["paper"] = None
        if len(known) == len(config.order):
            whole["paper"] = sum(k[config.stage] for k in known) / sum(k[0] for k in known)
    report = {
        "stage": config.stage,
        "settings": config.digest(),
        "sources": {**sources, "all": whole},
    }
    folder.write_json("report.json", report)
    with folder.writing("report.html") as file:
        file.write(make_page(report).encode())
    return report


def _add(parts: Sequence[dict[str, Any]], name: str, stage: int) -> dict[str, Any]:
    rows, kept = sum(p["rows"] for p in parts), sum(p["kept"] for p in parts)
    dropped = {r: sum(p["dropped"].get(r, 0) for p in parts) for r in REASONS}
    examples = {}
    for reason in REASONS:
        # One of every part in turn, so that one file does not stand for all.
        turns = itertools.zip_longest(*(p["examples"].get(reason, ()) for p in parts))
        found = [text for turn in turns for text in turn if text is not None]
        if found:
            examples[reason] = found[:EXAMPLES]
    if rows != kept + sum(dropped.values()):
        raise RuntimeError(
            f"{name}: {rows} rows were read, but {kept} are kept and {sum(dropped.values())} "
            "dropped; remove the output folder and begin anew."
        )
    paper = PAPER.get(name)
    return {
        "rows": rows,
        "kept": kept,
        "rate": kept / rows if rows else None,
        "paper": paper[stage] / paper[0] if paper else None,
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "examples": examples,
    }


def as_table(report: dict[str, Any]) -> str:
    """The report for a terminal: a line a source, then the reasons of all of them."""
    lines = [f"{'source':14}{'rows':>16}{'kept':>16}{'rate':>9}{'paper':>9}"]
    for name, entry in report["sources"].items():
        lines.append(
            f"{name:14}{entry['rows']:>16,}{entry['kept']:>16,}"
            f"{percent(entry['rate']):>9}{percent(entry['paper']):>9}"
        )
    whole = report["sources"]["all"]
    lines += ["", f"{'dropped for':24}{'rows':>16}{'share':>9}"]
    for reason, count in sorted(whole["dropped"].items(), key=lambda item: -item[1]):
        lines.append(f"{reason:24}{count:>16,}{percent(count / whole['rows']):>9}")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """E.g. "82.6 %", "-" where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"
