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
    """Two or three of the keywords in random order, or what there is.

    Args:
        rng: source of randomness.
        concept: the concept.
        language: code.

    Returns:
        e.g. "pet, cat".
    """
    words = concept.keywords.get(language) or (concept.names[language],)
    count = min(len(words), 2 + int(rng.integers(MAX_KEYWORDS - 1)))
    return ", ".join(words[i] for i in rng.permutation(len(words))[:count])


def other_concept(
    rng: np.random.Generator,
    number: int,
    concepts: Sequence[Concept],
    pool: np.ndarray,
    language: str,
) -> Concept:
    """Another concept, whose name in a language is no word for this one.

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
    own = _words(concepts[number], language)
    for _ in range(1000):
        other = concepts[int(pool[rng.integers(len(pool))])]
        if language in other.names and other.names[language] not in own:
            return other
    raise ValueError(f"No other concept than {concepts[number].key} has a name in {language!r}.")


def fits(caption: str, concept: Concept, language: str) -> bool:
    """Whether a caption says nothing that is not said of a concept too.

    Args:
        caption: a name, or keywords joined by ", ".
        concept: the concept.
        language: code.

    Returns:
        Whether its name is the caption or its keywords cover it.
    """
    own = _words(concept, language)
    return caption in own or all(word in own for word in caption.split(", "))


def _words(concept: Concept, language: str) -> set[str]:
    return {concept.names.get(language, ""), *concept.keywords.get(language, ())}


def training_pool(concepts: Sequence[Concept]) -> np.ndarray:
    """Numbers of the concepts that training may name.

    Args:
        concepts: the table of concepts.

    Returns:
        [.] int64.
    """
    return np.asarray([i for i, concept in enumerate(concepts) if not concept.unseen], np.int64)
