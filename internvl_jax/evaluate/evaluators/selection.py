"""Which of a gallery's pictures are looked at, and what the list they are on is called."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.datasets import Concept
from data_pipelines.evaluation import Gallery


def on_list(concept: Concept, which: str) -> bool:
    """Whether a concept is judged, seen, unseen, or on the list of all."""
    return {
        "judged": concept.judged,
        "seen": not concept.unseen,
        "unseen": concept.unseen,
        "all": True,
    }[which]


def list_name(name: str, which: str) -> str:
    """``fluent`` for the judged list, ``fluent_unseen`` and so on for the others."""
    return name if which == "judged" else f"{name}_{which}"


def spread(values: np.ndarray, count: int | None) -> np.ndarray:
    """At most `count` of the values, evenly spread over them; all of them for None."""
    if count is None or len(values) <= count:
        return values
    return values[np.arange(count) * len(values) // count]


def pick(gallery: Gallery, rows: np.ndarray) -> Gallery:
    """The gallery with only some of its pictures; all its candidates stay."""
    return dataclasses.replace(
        gallery,
        images=gallery.images[rows],
        records=gallery.records[rows],
        target=gallery.target[rows],
    )


def thin(gallery: Gallery, limit: int | None) -> Gallery:
    """The gallery with at most `limit` pictures, evenly spread."""
    return pick(gallery, spread(np.arange(len(gallery.images)), limit))
