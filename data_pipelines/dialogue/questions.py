"""VQA: VQAv2, OKVQA, A-OKVQA, IconQA, AI2D and GQA."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipelines.dialogue.annotations import HELD_OUT, Annotations, Record, records
from data_pipelines.dialogue.conversation import Conversation, converse
from data_pipelines.dialogue.pictures import coco
from data_pipelines.dialogue.prompts import (
    PICTURE_CHOICES,
    letter,
    multiple_choice,
    short_answer,
)
from data_pipelines.sample import BadRecordError

UNBALANCED = "not balanced"
"""Reason of GQA's questions that are left out because they are of its full set."""


def consensus(answers: Iterable[Any], place: str) -> str:
    """The answer that most annotators gave, the first of those that tie.

    Args:
        answers: text, numbers, or objects with an ``answer``, as mirrors have it.
        place: names the record in errors.

    Returns:
        The answer.

    Raises:
        BadRecordError: if there is none.
    """
    texts = [
        (Record(a, place).text("answer", "raw_answer") if isinstance(a, dict) else str(a)).strip()
        for a in answers
    ]
    counted = collections.Counter(text for text in texts if text)
    if not counted:
        raise BadRecordError("no answer", f"{place} has no answer.")
    return counted.most_common(1)[0][0]


def answer_of(record: Record) -> str:
    """The answer to learn: the set's own consensus if it has one, else `consensus`."""
    if record.has("multiple_choice_answer"):
        return record.text("multiple_choice_answer")
    # Only "answers" may be a list written as text: an answer may well begin with "[".
    if record.has("answers") and str(record.get("answers")).startswith("["):
        return consensus(record.list("answers"), record.place)
    value = record.get("answers", "answer", "label")
    if isinstance(value, list):
        return consensus(value, record.place)
    return record.text("answers", "answer", "label")


def option(record: Record, choices: list[str], *names: str) -> str:
    """The letter of the right option.

    Raises:
        BadRecordError: if its index is none of an option.
    """
    index = record.integer(*names)
    if not 0 <= index < min(len(choices), 26):
        raise BadRecordError(
            "wrong option", f"{record.place} calls option {index} right, of {len(choices)}."
        )
    return letter(index)


def vqav2(notes: Annotations) -> Iterator[Conversation]:
    """VQAv2 (https://visualqa.org): its ``multiple_choice_answer``, the most frequent of ten."""
    yield from _coco_questions(
        notes,
        ("v2_OpenEnded_mscoco_train2014_questions.json*", "*train*questions*.json*"),
        ("v2_mscoco_train2014_annotations.json*", "*train*annotations*.json*", "*train*.json*"),
    )


def okvqa(notes: Annotations) -> Iterator[Conversation]:
    """OKVQA (https://okvqa.allenai.org): the most frequent ``answer`` (not ``raw_answer``)."""
    yield from _coco_questions(
        notes,
        ("OpenEnded_mscoco_train2014_questions.json*", "*train*questions*.json*"),
        ("mscoco_train2014_annotations.json*", "*train*annotations*.json*", "*train*.json*"),
    )


def _coco_questions(
    notes: Annotations, questions: tuple[str, ...], annotations: tuple[str, ...]
) -> Iterator[Conversation]:
    asked: dict[str, str] = {}
    for path in notes.find_all(*questions, optional=True):
        for record in records(path, "questions"):
            with notes.guard():
                asked[record.text("question_id")] = record.text("question")
    for record in records(notes.find(*annotations), "annotations", "data"):
        with notes.guard():
            number = record.text("question_id")
            # Mirrors join both files: then the question is here.
            question = asked.get(number) or record.text("question")
            path = coco(record.integer("image_id"))
            rounds = [(short_answer(question), answer_of(record))]
            yield converse(notes.name, "vqa", number, path, rounds)


def aokvqa(notes: Annotations) -> Iterator[Conversation]:
    """A-OKVQA (https://allenai.org/project/a-okvqa), as multiple choice, like LLaVA-1.5."""
    for record in records(notes.find("aokvqa_v1p0_train.json*", "*train*.json*"), "data"):
        with notes.guard():
            record.training("split")
            choices = [str(choice) for choice in record.list("choices")]
            question = multiple_choice(record.text("question"), choices)
            answer = option(record, choices, "correct_choice_idx")
            path = coco(record.integer("image_id"), "train2017")
            yield converse(
                notes.name, "vqa", record.text("question_id"), path, [(question, answer)]
            )


def gqa(notes: Annotations) -> Iterator[Conversation]:
    """GQA (https://cs.stanford.edu/people/dorarad/gqa): the balanced questions, short answers."""
    files = notes.find_all(
        "train_balanced_questions.json*", "train_all_questions/*.json*", "*train*.json*"
    )
    for path in files:
        for record in records(path, "questions", key="question_id"):
            with notes.guard():
                if record.has("isBalanced") and not record.get("isBalanced"):
                    raise BadRecordError(UNBALANCED, f"{record.place} is not of the balanced set.")
                image = f"gqa/images/{record.text('imageId', 'image_id')}.jpg"
                rounds = [(short_answer(record.text("question")), record.text("answer"))]
                number = record.text("question_id", "id")
                yield converse(notes.name, "vqa", number, image, rounds)


def ai2d(notes: Annotations) -> Iterator[Conversation]:
    """AI2D (https://prior.allenai.org/projects/diagram-understanding), without its test pictures.

    Questions marked ``abcLabel`` ask about letters that must be drawn over the diagram's labels:
    they name ``ai2d/abc_images``, which mirrors have and the original archive has not.
    """
    test = {
        line.strip().strip(",").removesuffix(".png")
        for line in notes.find("ai2d_test_ids.csv").read_text(encoding="utf-8").splitlines()
    }
    for path in notes.find_all("questions/*.json"):
        with notes.guard():
            record = _one(path, path.name)
            name, asked = record.text("imageName"), record.get("questions")
            if name.removesuffix(".png") in test:
                raise BadRecordError(HELD_OUT, f"{record.place} is of the test set.")
            if not isinstance(asked, dict):
                raise BadRecordError("wrong questions", f"{record.place} holds no questions.")
            for text, question in asked.items():
                with notes.guard():
                    entry = Record(question, f"{record.place}, {text!r:.40}")
                    yield _diagram(notes, entry, text, name)


def _diagram(notes: Annotations, entry: Record, text: str, name: str) -> Conversation:
    choices = [str(choice) for choice in entry.list("answerTexts")]
    answer = option(entry, choices, "correctAnswer")
    lettered = entry.has("abcLabel") and entry.get("abcLabel")
    path = f"ai2d/{'abc_images' if lettered else 'images'}/{name}"
    rounds = [(multiple_choice(text, choices), answer)]
    return converse(notes.name, "vqa", entry.text("questionId"), path, rounds)


def iconqa(notes: Annotations) -> Iterator[Conversation]:
    """IconQA (https://iconqa.github.io): text choices and blanks to fill in."""
    yield from _iconqa(notes, ("choose_txt", "fill_in_blank"))


def iconqa_pictures(notes: Annotations) -> Iterator[Conversation]:
    """IconQA's choices that are pictures: several pictures a conversation, in words of ours."""
    yield from _iconqa(notes, ("choose_img",))


def _iconqa(notes: Annotations, kinds: tuple[str, ...]) -> Iterator[Conversation]:
    for kind in kinds:
        pattern = f"train/{kind}/*/data.json"
        for path in notes.find_all(pattern, f"iconqa/{pattern}"):
            with notes.guard():
                number = path.parent.name
                record = _one(path, f"{kind}/{number}/data.json")
                folder = f"iconqa/train/{kind}/{number}"
                images = [f"{folder}/image.png"]
                question = record.text("question")
                if kind == "fill_in_blank":
                    rounds = [(short_answer(question), record.text("answer"))]
                else:
                    choices = [str(choice) for choice in record.list("choices")]
                    answer = option(record, choices, "answer")
                    if kind == "choose_img":
                        images += [f"{folder}/{_file(choice)}" for choice in choices]
                        letters = ", ".join(map(letter, range(len(choices))))
                        question = f"{question}\n{PICTURE_CHOICES.format(letters=letters)}"
                        choices = []
                    rounds = [(multiple_choice(question, choices), answer)]
                yield converse(notes.name, "vqa", f"{kind}-{number}", images, rounds)


def _file(choice: str) -> str:
    return choice if "." in choice else f"choice_{choice}.png"


def _one(path: pathlib.Path, place: str) -> Record:
    # A file that is one record: where it is damaged, that record is bad.
    try:
        return Record(json.loads(path.read_text(encoding="utf-8")), place)
    except ValueError:
        return Record(None, place)
