"""Drawing a language and a caption for a concept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.datasets import Concept

MAX_KEYWORDS = 3


def choose(rng: np.random.Generator, options: Sequence):
    """One of several, evenly.

    Args:
        rng: source of randomness.
        options: at least one.

    Returns:
        The chosen one.
    """
    return options[int(rng.integers(len(options)))]


def choose_language(rng: np.random.Generator, concept: Concept, languages: Sequence[str]) -> str:
    """A language in which the concept has a name.

    Args:
        rng: source of randomness.
        concept: the concept.
        languages: those to draw from.

    Returns:
        A language code.

    Raises:
        ValueError: if it has a name in none of them.
    """
    named = [language for language in languages if language in concept.names]
    if not named:
        raise ValueError(
            f"Concept {concept.key} has no name in {', '.join(languages)}; add a language to "
            "data.languages."
        )
    return choose(rng, named)


def keyword_caption(rng: np.random.Generator, concept: Concept, language: str) -> str:
    """Up to three of the keywords in random order, or the name where there are none.

    Args:
        rng: source of randomness.
        concept: the concept.
        language: code.

    Returns:
        e.g. "pet, cat".
    """
    words = concept.keywords.get(language) or (concept.names[language],)
    count = 1 + int(rng.integers(min(MAX_KEYWORDS, len(words))))
    return ", ".join(words[i] for i in rng.permutation(len(words))[:count])


def other_concept(
    rng: np.random.Generator,
    number: int,
    concepts: Sequence[Concept],
    pool: np.ndarray,
    language: str,
) -> Concept:
    """Another concept, whose name in a language differs.

    Args:
        rng: source of randomness.
        number: the concept to avoid.
        concepts: the table of concepts.
        pool: concept numbers to draw from.
        language: both must have a name in it.

    Returns:
        The other concept.

    Raises:
        ValueError: if no draw of a thousand found one.
    """
    name = concepts[number].names[language]
    for _ in range(1000):
        other = concepts[int(pool[rng.integers(len(pool))])]
        if other.names.get(language, name) != name:
            return other
    raise ValueError(f"No other concept than {concepts[number].key} has a name in {language!r}.")


def training_pool(concepts: Sequence[Concept]) -> np.ndarray:
    """Numbers of the concepts that training may name.

    Args:
        concepts: the table of concepts.

    Returns:
        [.] int64.
    """
    return np.asarray([i for i, concept in enumerate(concepts) if not concept.unseen], np.int64)
