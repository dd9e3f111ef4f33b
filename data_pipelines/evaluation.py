"""Held-out pictures, names and questions, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import as_data_config
from data_pipelines.datasets import Concept, Dataset, open_dataset
from data_pipelines.image import RESIZES, decode
from data_pipelines.sets.questions import ask, conversation
from internvl_jax.batch import IMAGE_PLACEHOLDER

WHICH = ("judged", "seen", "unseen", "all")


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures, and the concepts whose names compete for them.

    Attributes:
        images: [N,S,S,3] uint8, resized, not cropped.
        records: [N] int64, record numbers.
        target: [N] int32, the candidate each picture shows.
        concepts: [C] candidates; each has a name in every language.
        names: language -> [C] names.
    """

    images: np.ndarray
    records: np.ndarray
    target: np.ndarray
    concepts: tuple[Concept, ...]
    names: Mapping[str, tuple[str, ...]]


def gallery(
    data_config: Any,
    *,
    split: str = "held_out",
    which: str = "judged",
    languages: Sequence[str] = (),
) -> Gallery:
    """Held-out pictures with the concepts that compete for them.

    Candidates are the concepts that the held-out vendor draws and that `which` admits:

    =======  =====================================================================
    judged   the fixed list of the headline figure (emoji: 943, see `emoji/split.py`)
    seen     all whose texts and other vendors' drawings were trained on
    unseen   the tenth that no training data shows or names
    all      seen and unseen
    =======  =====================================================================

    With split "held_out" picture i shows candidate i. With split "validation" (tuning) the pictures
    are the training vendors' kept-back drawings of candidates: fewer pictures, as many names.

    Args:
        data_config: settings of `DataConfig`, of which dataset, data_dir, image_size, resize and
            languages are used.
        split: "held_out" or "validation".
        which: one of `WHICH`.
        languages: codes, those of the config if empty.

    Returns:
        The gallery.

    Raises:
        ValueError: if split or which is unknown.
        BadImageError: if a picture cannot be read.
    """
    config = as_data_config(data_config)
    languages = tuple(languages) or config.languages
    if split not in ("held_out", "validation"):
        raise ValueError(f"Split {split!r} is not for judging; choose held_out or validation.")
    if which not in WHICH:
        raise ValueError(f"Concepts {which!r} are unknown; choose from {', '.join(WHICH)}.")
    dataset = open_dataset(config.dataset, config.data_dir)
    drawn = np.unique(dataset.concept[dataset.splits["held_out"]])
    numbers = [int(i) for i in drawn if _admits(dataset.concepts[i], which, languages)]
    place = {number: i for i, number in enumerate(numbers)}
    records = [r for r in dataset.splits[split] if int(dataset.concept[r]) in place]
    records.sort(key=lambda record: place[int(dataset.concept[record])])
    size, resize = config.image_size, RESIZES[config.resize]
    pictures = (decode(dataset.pictures[int(record)]) for record in records)
    images = [resize(pixels, size, resample="exact") for pixels in pictures]
    concepts = tuple(dataset.concepts[number] for number in numbers)
    return Gallery(
        images=np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8),
        records=np.asarray(records, np.int64),
        target=np.asarray([place[int(dataset.concept[r])] for r in records], np.int32),
        concepts=concepts,
        names={code: tuple(concept.names[code] for concept in concepts) for code in languages},
    )


def _admits(concept: Concept, which: str, languages: Sequence[str]) -> bool:
    if any(language not in concept.names for language in languages):
        return False
    return {
        "judged": concept.judged,
        "seen": not concept.unseen,
        "unseen": concept.unseen,
        "all": True,
    }[which]


def mismatches(pictures: Gallery, language: str, seed: int = 0) -> np.ndarray:
    """A wrong name for every picture, for balanced matching pairs.

    Args:
        pictures: the gallery.
        language: in which the names must differ.
        seed: of the draw.

    Returns:
        [N] int32 candidates, each with another name than the right one.

    Raises:
        ValueError: if all names are alike.
    """
    names = np.asarray(pictures.names[language])
    wrong = np.empty(len(pictures.target), np.int32)
    for i, target in enumerate(pictures.target):
        rng = np.random.default_rng((seed, int(pictures.records[i])))
        others = np.flatnonzero(names != names[target])
        if not len(others):
            raise ValueError(f"The names in {language!r} are all alike; nothing can mismatch.")
        wrong[i] = rng.choice(others)
    return wrong


def questions(
    pictures: Gallery, kind: str, languages: Sequence[str] = (), seed: int = 0
) -> list[dict[str, Any]]:
    """One question about every picture, wrong names drawn from the candidates.

    Args:
        pictures: the gallery.
        kind: "what", "which", "is" or "language" (`examples.instructions`).
        languages: of the names, those of the gallery if empty.
        seed: of the draw.

    Returns:
        [N] records in LLaVA's format ``{id, image, conversations}`` (image is the record number,
        the last turn the right answer) with ``kind``, ``language``, and ``choices`` (empty where
        the question is open).
    """
    languages = tuple(languages) or tuple(pictures.names)
    pool = np.arange(len(pictures.concepts))
    out = []
    for record, target in zip(pictures.records, pictures.target):
        rng = np.random.default_rng((seed, int(record)))
        question = ask(kind, int(target), pictures.concepts, pool, languages, rng)
        key = pictures.concepts[int(target)].key
        entry = conversation(f"{key}/{kind}", str(int(record)), [question])
        entry |= {
            "kind": kind,
            "language": question.language,
            "choices": list(question.choices),
        }
        out.append(entry)
    return out


def open_prompt(conversations: Sequence[Mapping[str, str]]) -> list[dict[str, str | None]]:
    """A conversation with its last answer left open, as `Template.segments` takes it.

    Args:
        conversations: turns, the last one an answer.

    Returns:
        The turns before the last answer.
    """
    turns: list[dict[str, str | None]] = [dict(turn) for turn in conversations[:-1]]
    if not any(IMAGE_PLACEHOLDER in str(turn["value"]) for turn in turns):
        turns[0]["value"] = f"{IMAGE_PLACEHOLDER}\n{turns[0]['value']}"
    return turns


def describe(dataset: Dataset) -> dict[str, int]:
    """How many there are of what.

    Args:
        dataset: the set.

    Returns:
        Name -> count of concepts (all, judged, unseen) and of the drawings of each split.
    """
    return {
        "concepts": len(dataset.concepts),
        "judged": sum(concept.judged for concept in dataset.concepts),
        "unseen": sum(concept.unseen for concept in dataset.concepts),
        "train": len(dataset.splits["train"]),
        "validation": len(dataset.splits["validation"]),
        "unseen_drawings": len(dataset.splits["unseen"]),
        "held_out": len(dataset.splits["held_out"]),
    }
