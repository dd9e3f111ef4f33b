"""A generated instruction set: questions about a picture of a concept, with their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.config import QUESTIONS, DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.sets.captions import choose, choose_language, other_concept
from internvl_jax.batch import IMAGE_PLACEHOLDER, LANGUAGES

LETTERS = ("A", "B")
TEMPLATES = {
    "which": ("Which of these two names fits?\nA. {first}\nB. {second}",),
    "is": ("Is this {name}?", "Does the picture show {name}?"),
    "what": ("What is this in {language}?", "Name this in {language}."),
    "language": ("In which language is it called {name}?",),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: one of `QUESTIONS`.
        text: the question.
        answer: the right answer.
        choices: the answers a closed question allows, the right one among them; empty if open.
        language: code of the language that its names are in.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]
    language: str


def ask(
    kind: str,
    number: int,
    concepts: Sequence[Concept],
    pool: np.ndarray,
    languages: Sequence[str],
    rng: np.random.Generator,
) -> Question:
    """One question about a picture of a concept.

    Args:
        kind: one of `QUESTIONS`.
        number: the concept shown.
        concepts: the table of concepts.
        pool: concept numbers that wrong names are drawn from.
        languages: codes of the languages to draw from.
        rng: source of randomness.

    Returns:
        The question.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in TEMPLATES:
        raise ValueError(f"Question kind {kind!r} is unknown; choose from {', '.join(QUESTIONS)}.")
    template = choose(rng, TEMPLATES[kind])
    concept = concepts[number]
    language = choose_language(rng, concept, languages)
    name = concept.names[language]
    if kind == "what":
        text = template.format(language=LANGUAGES[language])
        return Question(kind, text, name, (), language)
    if kind == "language":
        # A name shared with another of the languages would have two right answers.
        own = [code for code in languages if _is_own(concept, code, languages)] or [language]
        language = choose(rng, own)
        text = template.format(name=concept.names[language])
        choices = tuple(LANGUAGES[code] for code in languages)
        return Question(kind, text, LANGUAGES[language], choices, language)
    wrong = other_concept(rng, number, concepts, pool, language).names[language]
    right_first = rng.random() < 0.5
    if kind == "which":
        first, second = (name, wrong) if right_first else (wrong, name)
        text = template.format(first=first, second=second)
        return Question(kind, text, LETTERS[not right_first], LETTERS, language)
    text = template.format(name=name if right_first else wrong)
    return Question(kind, text, "Yes" if right_first else "No", ("Yes", "No"), language)


def _is_own(concept: Concept, language: str, languages: Sequence[str]) -> bool:
    name = concept.names.get(language)
    return name is not None and all(
        concept.names.get(code, "").casefold() != name.casefold()
        for code in languages
        if code != language
    )


def converse(
    number: int,
    concepts: Sequence[Concept],
    pool: np.ndarray,
    config: DataConfig,
    rng: np.random.Generator,
) -> list[Question]:
    """Several questions about one picture.

    Each is asked in another language, so that no answer can be read off an earlier one.

    Args:
        number: the concept shown.
        concepts: the table of concepts.
        pool: concept numbers that wrong names are drawn from.
        config: its languages, max_questions and questions are used.
        rng: source of randomness.

    Returns:
        1 to ``max_questions`` questions in the order of `QUESTIONS`, not more than there are
        languages with a name.
    """
    languages = config.languages
    # With a name in none of them, `ask` says so.
    named = [code for code in languages if code in concepts[number].names] or languages[:1]
    count = min(1 + int(rng.integers(config.max_questions)), len(named))
    asked = sorted((choose(rng, config.questions) for _ in range(count)), key=QUESTIONS.index)
    order = rng.permutation(len(named))
    return [
        ask(kind, number, concepts, pool, languages if kind == "language" else (named[i],), rng)
        for kind, i in zip(asked, order)
    ]


def conversation(identifier: str, image: str, questions: Sequence[Question]) -> dict:
    """A record in LLaVA's format.

    Args:
        identifier: of the record.
        image: of the picture.
        questions: about it; the first turn gets the placeholder of the picture.

    Returns:
        ``{id, image, conversations: [{from, value}]}``.
    """
    turns = []
    for place, question in enumerate(questions):
        head = f"{IMAGE_PLACEHOLDER}\n" if place == 0 else ""
        turns += [
            {"from": "human", "value": head + question.text},
            {"from": "gpt", "value": question.answer},
        ]
    return {"id": identifier, "image": image, "conversations": turns}
