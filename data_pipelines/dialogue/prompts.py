"""The words that tell the model which form of answer is wanted.

The paper turns sets that are no dialogues into dialogues with the response-format prompts of
LLaVA-1.5 (InternVL, https://arxiv.org/abs/2312.14238, 3.3; LLaVA-1.5, https://arxiv.org/abs/
2310.03744). `SHORT_ANSWER` and `LETTER` are checked against LLaVA's docs/Evaluation.md, `CAPTION`
against the paper's table of its 665K mixture, `DESCRIBE` and `LOCATE` against records of that
mixture. TextCaps' records there have OCR tokens after the prompt, which TextCaps' own file lacks.
What is marked as ours is published nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Please provide a short description for this region: {box}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {text}"

SHORT_ANSWER_ZH = "请用一个词或短语回答问题。"
"""Ours, for EST-VQA's Chinese questions."""
LOCATE_ANSWER = "Please provide the bounding box coordinate of the region that answers this."
"""Ours, for Toloka's questions that are answered by a box."""
PICTURE_CHOICES = "The first picture shows the question, the following ones the options {letters}."
"""Ours, for IconQA's choices that are pictures: templates put all pictures before the text."""

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def short_answer(question: str) -> str:
    """A question that wants a word or a phrase.

    Args:
        question: in English or Chinese.

    Returns:
        The question and, in a line of its own, the prompt of its language.
    """
    return f"{question}\n{SHORT_ANSWER_ZH if _CHINESE.search(question) else SHORT_ANSWER}"


def letter(index: int) -> str:
    """The letter of an option: 0 is A.

    Args:
        index: 0 to 25.

    Returns:
        One capital letter.
    """
    return chr(ord("A") + index)


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """A question that wants the letter of one of its options.

    Args:
        question: the question.
        choices: the options, at most 26.

    Returns:
        Question, options ("A. …") and prompt, a line each.
    """
    options = [f"{letter(i)}. {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question, *options, LETTER])


def sentence(text: str) -> str:
    """A phrase written as LLaVA-1.5's mixture writes those of RefCOCO.

    Args:
        text: for example "lady in blue".

    Returns:
        With a capital and a full stop: "Lady in blue.".
    """
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", "。")) else f"{text}."
