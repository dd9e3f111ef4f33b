"""Generated texts against what they should say."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SEPARATORS = re.compile(r"[,，、،]")
_ENDING = ".!?。！？؟…"


def normalize(text: str) -> str:
    """One spelling of a text: NFKC, case folded, single spaces, no closing punctuation.

    Args:
        text: any text.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    # "..." alone is what it says, not an ending.
    return text.rstrip(_ENDING).rstrip() or text


def parts(text: str) -> frozenset[str]:
    """The normalised items of a comma-separated text, and the text as a whole.

    Args:
        text: e.g. "pet, cat".

    Returns:
        e.g. {"pet", "cat", "pet, cat"}; empty for an empty text.
    """
    items = {normalize(item) for item in (*SEPARATORS.split(text), text)}
    return frozenset(items - {""})


def choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the allowed answers was given.

    Args:
        answer: generated text.
        choices: allowed answers.

    Returns:
        The number of the one choice that equals the answer once both are normalised; None
        (unparsable, to be counted as wrong) if none does, or several do.
    """
    answer = normalize(answer)
    equal = [i for i, option in enumerate(choices) if normalize(option) == answer]
    return equal[0] if len(equal) == 1 else None


class HitRate(NamedTuple):
    """How often answers are right, beside what needs no picture.

    Attributes:
        rate: share of answers that are accepted.
        shuffled: the same answers handed to the pictures at random (exact expectation): chance for
            a model that knows the words but does not look.
        constant: one and the same answer for all pictures, with as many items as the longest one
            given, chosen greedily with knowledge of the right answers.
    """

    rate: float
    shuffled: float
    constant: float


def hit_rate(answers: Sequence[Iterable[str]], accepted: Sequence[Iterable[str]]) -> HitRate:
    """Share of answers with an item that is accepted for their picture.

    Args:
        answers: [N] sets of normalised items (`parts`, or one `normalize`d text).
        accepted: [N] sets of normalised items.

    Returns:
        The rate and its two baselines.

    Raises:
        ValueError: if there are none, or not as many of both.
    """
    n = len(answers)
    if n == 0 or n != len(accepted):
        raise ValueError(f"{n} answers and {len(accepted)} pictures: give one answer a picture.")
    answers, accepted = [set(a) for a in answers], [set(a) for a in accepted]
    welcome = collections.defaultdict(lambda: np.zeros(n, np.bool_))
    for i, items in enumerate(accepted):
        for item in items:
            welcome[item][i] = True
    pairs = 0
    for items in answers:
        found = [welcome[item] for item in items if item in welcome]
        pairs += int(np.count_nonzero(np.any(found, axis=0))) if found else 0
    return HitRate(
        rate=sum(bool(a & b) for a, b in zip(answers, accepted)) / n,
        shuffled=pairs / n**2,
        constant=_covered(list(welcome.values()), max(1, *map(len, answers))) / n,
    )


def _covered(rows: Sequence[np.ndarray], count: int) -> int:
    """Columns that `count` rows cover, each chosen for what it adds."""
    if not rows:
        return 0
    table = np.stack(rows)
    covered = np.zeros(table.shape[1], np.bool_)
    for _ in range(count):
        covered |= table[np.argmax(np.count_nonzero(table & ~covered, axis=1))]
    return int(np.count_nonzero(covered))
