"""Puts drawings and names together: the concepts, and the drawings of every split."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from data_pipelines.datasets import SPLITS, Concept
from data_pipelines.emoji import names, split
from data_pipelines.emoji.drawings import HELD_OUT_VENDOR, TRAINING_VENDORS, IconSet, find_icons


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One picture to be.

    Attributes:
        concept: number of the concept.
        vendor: who drew it.
        icon: its name there.
    """

    concept: int
    vendor: str
    icon: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the archives say, before anything is drawn.

    Attributes:
        concepts: the table, ordered by key.
        drawings: split -> drawings.
        icons: vendor -> its icons.
    """

    concepts: tuple[Concept, ...]
    drawings: Mapping[str, tuple[Drawing, ...]]
    icons: Mapping[str, IconSet]


def make_plan(archives: Mapping[str, pathlib.Path]) -> Plan:
    """Reads the archives and applies the rules of `split`.

    Args:
        archives: from `fetch.fetch`.

    Returns:
        The plan.

    Raises:
        ValueError: if the judged list is too short, which only other packages can cause.
    """
    annotations = names.read_annotations(archives)
    vendors = (*TRAINING_VENDORS, HELD_OUT_VENDOR)
    sets = {vendor: IconSet(vendor, archives[vendor]) for vendor in vendors}
    keys = names.without_skin_tones(key for icons in sets.values() for key in icons.chars)
    english = {key: entry["name"] for key, entry in annotations["en"].items()}
    icons = find_icons(sets, [key for key in keys if key in english], english)
    icons = {key: found for key, found in icons.items() if set(found) & set(TRAINING_VENDORS)}

    unseen = split.choose_unseen(icons)
    validation = split.choose_validation(icons, unseen)
    concepts, drawings = [], {name: [] for name in SPLITS}
    for number, (key, found) in enumerate(icons.items()):
        group = next(filter(None, (icons.group(key) for icons in sets.values())), "Other")
        concepts.append(
            Concept(
                key=key,
                group=group,
                names=names.named_in(annotations, key),
                keywords=names.keywords_in(annotations, key),
                unseen=key in unseen,
                judged=split.is_judged(key, group, found, unseen),
            )
        )
        for vendor, icon in found.items():
            if vendor == HELD_OUT_VENDOR:
                name = "held_out"
            elif key in unseen:
                name = "unseen"
            else:
                name = "validation" if validation.get(key) == vendor else "train"
            drawings[name].append(Drawing(number, vendor, icon))
    judged = sum(concept.judged for concept in concepts)
    if judged < split.MIN_JUDGED:
        raise ValueError(
            f"Only {judged} concepts can be judged instead of {split.MIN_JUDGED}; the packages "
            "are not the pinned ones."
        )
    parts = {name: tuple(part) for name, part in drawings.items()}
    return Plan(tuple(concepts), parts, sets)
