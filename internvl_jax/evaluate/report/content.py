"""What a report says: plain values, in the order of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of the scorecard.

    Attributes:
        value: a share of 0..1; None was not measured.
        beside: what stands under it, e.g. "23 × chance".
        met: whether it reaches the target; None where the target is not about this cell.
    """

    value: float | None
    beside: str = ""
    met: bool | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the scorecard.

    Attributes:
        title: what is claimed.
        detail: on how many cases, and the level of chance.
        target: what must be reached.
        cells: column -> figure; the columns of all claims together make the table's.
    """

    title: str
    detail: str
    target: str
    cells: Mapping[str, Cell]

    def verdict(self) -> str:
        """``met``, ``missed`` or, where a figure is lacking, ``not measured``."""
        judged = [cell.met for cell in self.cells.values() if cell.met is not None]
        if False in judged:
            return "missed"
        whole = judged and all(cell.value is not None for cell in self.cells.values())
        return "met" if whole else "not measured"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One chart of a quantity over the steps of a stage.

    Attributes:
        title: e.g. "Stage 1 · contrastive".
        caption: one sentence under it.
        series: name -> (step, value) pairs; the first is the training loss.
        reference: a named level, e.g. ("guessing", 4.85).
    """

    title: str
    caption: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    reference: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Bars:
    """One chart of shares beside chance.

    Attributes:
        title: e.g. "Seen concepts".
        caption: on how many cases.
        rows: (label, series -> share, chance, target or None).
    """

    title: str
    caption: str
    rows: Sequence[tuple[str, Mapping[str, float], float, float | None]]


@dataclasses.dataclass(frozen=True)
class Report:
    """A page. Sections without content are left out.

    Attributes:
        title: of the page.
        summary: a paragraph: what was trained, on what, for how long, what came of it.
        facts: label -> value, a strip under the summary.
        claims: the scorecard.
        curves: losses.
        bars: shares beside chance; `legend` names their series.
        legend: of the bars.
        retrieval: ``{pictures, names}`` (`runner.evaluate_contrastive`).
        captions: `runner.evaluate_generative`'s examples.
        dialogues: `runner.evaluate_chat`'s examples.
        commands: (what it does, command).
        versions: package -> version.
        limits: sentences: what the figures do not show.
        attribution: Markdown (paragraphs and tables): whose pictures and names these are.
        figures: every figure, name -> value.
    """

    title: str
    summary: str
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    claims: Sequence[Claim] = ()
    curves: Sequence[Curve] = ()
    bars: Sequence[Bars] = ()
    legend: Sequence[str] = ()
    retrieval: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    captions: Sequence[Mapping[str, Any]] = ()
    dialogues: Sequence[Mapping[str, Any]] = ()
    commands: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Sequence[str] = ()
    attribution: str = ""
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
