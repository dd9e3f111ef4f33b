"""The record that every annotation becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.dialogue.boxes import Box
from data_pipelines.sample import BadRecordError, Turn
from internvl_jax.batch import IMAGE_PLACEHOLDER

TASKS = ("captioning", "vqa", "ocr", "grounding", "grounded_captioning", "conversation")
"""The rows of the paper's Table 3."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation about pictures, or about none.

    Attributes:
        id: names it within its source.
        source: name of its set.
        task: one of `TASKS`.
        images: paths relative to the folder of pictures, in the order of their "<image>".
        turns: human and gpt in alternation, beginning with the human.
        box: x1, y1, x2, y2 in [0, 1] that the text speaks of, in the text's own frame.
    """

    id: str
    source: str
    task: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    box: Box | None = None

    def to_json(self) -> dict[str, Any]:
        """In LLaVA's format.

        Returns:
            ``{id, source, image, conversations: [{from, value}], task, box}``; ``image`` is a
            string, a list where there are several, absent where there is none, as is ``box``.
        """
        record: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.images:
            record["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        record["conversations"] = [{"from": t.role, "value": t.value} for t in self.turns]
        record["task"] = self.task
        if self.box is not None:
            record["box"] = [round(value, 4) for value in self.box]
        return record


def converse(
    source: str,
    task: str,
    identifier: object,
    images: str | Sequence[str],
    rounds: Iterable[tuple[str, str]],
    *,
    box: Box | None = None,
) -> Conversation:
    """A conversation of questions and answers, its pictures in front of the first question.

    Args:
        source: name of the set.
        task: one of `TASKS`.
        identifier: names the record.
        images: path or paths of its pictures.
        rounds: questions with their answers. A "<image>" in them is text of the data and goes.
        box: see `Conversation`.

    Returns:
        The conversation.

    Raises:
        BadRecordError: if a question or an answer is empty, or there is none, or a path leads out
            of the folder of pictures.
    """
    paths = [images] if isinstance(images, str) else list(images)
    place = f"{source} {identifier}"
    turns = []
    for question, answer in rounds:
        question = question.replace(IMAGE_PLACEHOLDER, " ").strip()
        answer = answer.replace(IMAGE_PLACEHOLDER, " ").strip()
        if not question or not answer:
            kind = "answer" if question else "question"
            raise BadRecordError(f"empty {kind}", f"{place} has an empty {kind}.")
        head = f"{IMAGE_PLACEHOLDER}\n" * len(paths) if not turns else ""
        turns += [Turn("human", head + question), Turn("gpt", answer)]
    if not turns:
        raise BadRecordError("no question", f"{place} has no question.")
    checked = tuple(relative(path, place) for path in paths)
    return Conversation(str(identifier), source, task, checked, tuple(turns), box)


def relative(path: str, place: str) -> str:
    """A path that stays within the folder of pictures.

    Args:
        path: from an annotation file.
        place: names the record in errors.

    Returns:
        The path without leading or doubled "./" and "/".

    Raises:
        BadRecordError: if it is empty, has backslashes or "..".
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\\" in path or "\0" in path or path.startswith("/"):
        raise BadRecordError("unsafe path", f"{place} names its picture {path!r}, no safe path.")
    return "/".join(parts)
