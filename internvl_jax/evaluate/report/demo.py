"""The demo's report: its claims, curves and limits, from figures and logs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.batch import LANGUAGES
from internvl_jax.evaluate.report.content import Bars, Cell, Claim, Curve, Report

RATIO = 15.0
"""Stage 1 must find names at so many times chance."""
ACCURACY = 0.8
"""Matching and closed questions must be right more often than this."""

LISTS = {
    "": ("Seen concepts", "the fixed list: concepts trained on, drawn by an artist who was not"),
    "_unseen": ("Unseen concepts", "concepts that no training data shows or names"),
    "_all": ("All concepts", "seen and unseen, faces, people and flags included"),
}


def demo_report(
    figures: Mapping[str, float],
    examples: Mapping[str, Mapping[str, Any]],
    *,
    curves: Sequence[Curve] = (),
    facts: Mapping[str, str] | None = None,
    training: str = "",
    commands: Sequence[tuple[str, str]] = (),
    attribution: str = "",
    languages: Sequence[str] = ("en", "zh", "ja", "ar", "it"),
    vendor: str = "fluent",
) -> Report:
    """The page of the demo.

    Args:
        figures: ``stage1.fluent.en.i2t_R@10`` and so on (`evaluate.runner`, the stage in front).
        examples: "stage1", "stage2", "stage3" -> what the runner's functions return beside figures.
        curves: from `read_curve`.
        facts: label -> value: duration, device, sizes.
        training: a sentence on what was trained, on what, for how long.
        commands: (what it does, command).
        attribution: Markdown, whose pictures these are.
        languages: of the names.
        vendor: whose drawings are judged.

    Returns:
        What `page.write_report` takes. Figures that are missing are shown as not measured.
    """
    generative, chat = examples.get("stage2", {}), examples.get("stage3", {})
    return Report(
        title="A small InternVL, trained through its three stages",
        summary=" ".join(filter(None, (training, _outcome(figures, languages, vendor)))),
        facts=dict(facts or {}),
        claims=make_claims(figures, languages, vendor),
        curves=curves,
        bars=make_bars(figures, languages, vendor),
        legend=("InternVL-C after stage 1", "InternVL-G after stage 2"),
        retrieval=examples.get("stage1", {}),
        captions=generative.get("captions", ()),
        dialogues=chat.get("dialogues", ()),
        commands=commands,
        versions=versions(),
        limits=make_limits(figures, vendor),
        attribution=attribution,
        figures=dict(figures),
    )


def make_claims(figures: Mapping[str, float], languages: Sequence[str], vendor: str) -> list[Claim]:
    """The figures that the demo must reach, beside chance.

    Args:
        figures: as in `demo_report`.
        languages: of the names.
        vendor: whose drawings are judged.

    Returns:
        Name retrieval after stage 1, after stage 2, matching, closed questions.
    """

    def get(name: str) -> float | None:
        return figures.get(name.format(v=vendor))

    def retrieval(stage: str, judge: Any) -> dict[str, Cell]:
        cells = {}
        for code in languages:
            value = get(f"{stage}.{{v}}.{code}.i2t_R@10")
            cells[code] = Cell(None) if value is None else judge(code, value)
        return cells

    def stage1(code: str, value: float) -> Cell:
        ratio = figures[f"stage1.{vendor}.{code}.ratio_R@10"]
        return Cell(value, f"{ratio:.1f} × chance", ratio >= RATIO)

    def stage2(code: str, value: float) -> Cell:
        before = get(f"stage1.{{v}}.{code}.i2t_R@10")
        if before is None:
            return Cell(value)
        return Cell(value, f"stage 1: {before:.3f}", value >= before)

    def accuracy(stage: str, name: str) -> dict[str, Cell]:
        cells = {}
        for code in (*languages, "all"):
            prefix = f"{stage}.{vendor}" + ("" if code == "all" else f".{code}")
            value = figures.get(f"{prefix}.{name}_accuracy")
            chance = figures.get(f"{prefix}.{name}_chance")
            beside = "" if chance is None else f"chance {chance:.2f}"
            met = value > ACCURACY if code == "all" and value is not None else None
            cells[code] = Cell(value, beside, met)
        return cells

    def cases(name: str, unit: str) -> str:
        n = get(name)
        return "" if n is None else f"{n:,.0f} {unit}"

    first = languages[0]
    chance = get(f"stage1.{{v}}.{first}.chance_R@10")
    names = [get(f"stage1.{{v}}.{code}.names") for code in languages]
    known = sorted(int(n) for n in names if n is not None)
    listed = cases(f"stage1.{{v}}.{first}.n", "pictures")
    if known and chance is not None:
        span = f"{known[0]}" if known[0] == known[-1] else f"{known[0]}–{known[-1]}"
        listed += f", {span} names a language, chance {chance:.4f}"
    return [
        Claim(
            "Stage 1 finds the name: R@10, InternVL-C",
            listed,
            f"{RATIO:g} × chance in every language",
            retrieval("stage1", stage1),
        ),
        Claim(
            "Stage 2 keeps finding it: R@10, InternVL-G",
            listed,
            "not below stage 1 in any language",
            retrieval("stage2", stage2),
        ),
        Claim(
            "Stage 2 tells a right name from a wrong one",
            cases("stage2.{v}.itm_n", "pairs, half of them right"),
            f"above {ACCURACY} over all languages",
            accuracy("stage2", "itm"),
        ),
        Claim(
            "Stage 3 answers “which of these two names”",
            cases("stage3.{v}.which_n", "questions, an unclear answer is wrong"),
            f"above {ACCURACY} over all languages",
            accuracy("stage3", "which"),
        ),
    ]


def make_bars(figures: Mapping[str, float], languages: Sequence[str], vendor: str) -> list[Bars]:
    """R@10 per list and language, beside chance.

    Args:
        figures: as in `demo_report`.
        languages: of the names.
        vendor: whose drawings are judged.

    Returns:
        One chart a list that was measured.
    """
    out = []
    for suffix, (title, caption) in LISTS.items():
        rows, counts = [], set()
        for code in languages:
            prefixes = {
                "stage 1": f"stage1.{vendor}{suffix}.{code}",
                "stage 2": f"stage2.{vendor}{suffix}.{code}",
            }
            found = {
                stage: figures[f"{prefix}.i2t_R@10"]
                for stage, prefix in prefixes.items()
                if f"{prefix}.i2t_R@10" in figures
            }
            if "stage 1" not in found:
                continue
            prefix = prefixes["stage 1"]
            chance = figures[f"{prefix}.chance_R@10"]
            counts.add((int(figures[f"{prefix}.n"]), int(figures[f"{prefix}.names"])))
            rows.append((LANGUAGES[code], found, chance, None if suffix else RATIO * chance))
        if rows:
            pictures, names = max(counts)
            caption = f"R@10; {caption}: {pictures:,} pictures, {names:,} names."
            out.append(Bars(title, caption, rows))
    return out


def make_limits(figures: Mapping[str, float], vendor: str) -> list[str]:
    """What the demo's figures do not show.

    Args:
        figures: as in `demo_report`.
        vendor: whose drawings are judged.

    Returns:
        Sentences.
    """
    out = [
        "The models are tiny and their world is emoji: nothing here says how InternVL does on "
        "photographs.",
        "Recall at 10 looks for the name in a closed list. Finding it there is easier than saying "
        "it; what the model says by itself stands under Captions.",
        "The judged drawings are by an artist who was never trained on, the concepts were: other "
        "artists drew them. For concepts that are new altogether see the unseen list, with a level "
        "of chance of its own: it is shorter.",
        "All these languages were trained on together, so this measures no transfer from one to "
        "another.",
        "Wrong names in pairs and questions are drawn evenly from the list; most of them are far "
        "from the right one. The questions come from the generator of the training set: they test "
        "whether the picture is looked at, not whether the model converses.",
    ]
    value, n = figures.get(f"stage1.{vendor}.en.i2t_R@10"), figures.get(f"stage1.{vendor}.en.n")
    if value is not None and n:
        error = math.sqrt(value * (1 - value) / n)
        out.append(
            f"One run with one seed: the standard error of a share like {value:.2f} on {n:.0f} "
            f"pictures is {error:.3f}, so smaller differences mean nothing."
        )
    return out


def read_curve(
    folder: str | os.PathLike,
    title: str,
    *,
    caption: str = "",
    reference: tuple[str, float] | None = None,
) -> Curve:
    """The losses that a stage logged.

    Args:
        folder: its work directory, which holds ``metrics.jsonl``.
        title: of the chart.
        caption: of the chart.
        reference: a named level to draw.

    Returns:
        The curve; without points where there is no log. Lines that a killed run left unfinished
        are passed over.
    """
    series: dict[str, list[tuple[float, float]]] = {"training": [], "validation": []}
    path = pathlib.Path(folder) / "metrics.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        for name, key in (("training", "train/loss"), ("validation", "validation/loss")):
            if key in entry:
                series[name].append((float(entry["step"]), float(entry[key])))
    return Curve(title, caption, {name: rows for name, rows in series.items() if rows}, reference)


def versions() -> dict[str, str]:
    """Python and the installed packages that the requirements of this project name."""
    out = {"python": platform.python_version()}
    try:
        lines = importlib.metadata.requires("internvl-jax") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(_PACKAGES)
    for line in lines:
        match = re.match(r"[A-Za-z0-9_.-]+", line)
        if match is None or "extra ==" in line:
            continue
        try:
            out[match[0]] = importlib.metadata.version(match[0])
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


_PACKAGES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "numpy",
    "pillow",
)


def minutes(seconds: float) -> str:
    """A duration for reading: "48 s", "7 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = round(seconds / 60)
    return f"{whole} min" if whole < 90 else f"{whole // 60} h {whole % 60} min"


def _outcome(figures: Mapping[str, float], languages: Sequence[str], vendor: str) -> str:
    """What came of it, in a sentence."""
    found = {
        code: figures[f"stage1.{vendor}.{code}.i2t_R@10"]
        for code in languages
        if f"stage1.{vendor}.{code}.i2t_R@10" in figures
    }
    if not found:
        return ""
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    prefix = f"stage1.{vendor}.{high}"
    return (
        f"Shown drawings by an artist it has never seen, {figures[f'{prefix}.n']:.0f} of them, it "
        f"has the right name among its ten best of {figures[f'{prefix}.names']:.0f} for "
        f"{found[low]:.0%} ({LANGUAGES[low]}) to {found[high]:.0%} ({LANGUAGES[high]}) of them; "
        f"guessing would reach {figures[f'{prefix}.chance_R@10']:.1%}."
    )
