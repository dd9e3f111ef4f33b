"""The texts that the tokenizer of a prepared set is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.datasets import Concept
from data_pipelines.sets.questions import TEMPLATES
from internvl_jax.batch import LANGUAGES, SUMMARIZE, VICUNA_V1, caption_prompt

FRAME_REPEATS = 50
"""Prompts and the template's words come with every row; their pieces should be whole words."""


def make_corpus(
    concepts: Sequence[Concept], languages: Sequence[str] = tuple(LANGUAGES)
) -> list[str]:
    """Names, keywords, prompts and the words around questions.

    Args:
        concepts: those that may be trained on.
        languages: of names, keywords and prompts.

    Returns:
        The texts, in a fixed order.
    """
    texts = []
    for concept in concepts:
        texts += [concept.names[code] for code in languages if code in concept.names]
        for code in languages:
            texts += concept.keywords.get(code, ())
    frame = [SUMMARIZE, VICUNA_V1.system, "USER: ASSISTANT:", "Yes", "No"]
    frame += [caption_prompt(language) for language in languages]
    frame += [LANGUAGES[language] for language in languages]
    for questions in TEMPLATES.values():
        frame += [
            question.format(language="", first="", second="", name="") for question in questions
        ]
    return texts + frame * FRAME_REPEATS
