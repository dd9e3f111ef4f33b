"""OCR: OCR-VQA, ChartQA, DocVQA, InfoVQA, ST-VQA and EST-VQA."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.dialogue.annotations import Annotations, Record, records
from data_pipelines.dialogue.conversation import Conversation, converse
from data_pipelines.dialogue.prompts import short_answer
from data_pipelines.dialogue.questions import answer_of
from data_pipelines.sample import BadRecordError


def ocrvqa(notes: Annotations) -> Iterator[Conversation]:
    """OCR-VQA (https://ocr-vqa.github.io), split 1: all questions on a cover in one conversation.

    Only the first question carries the prompt, as in LLaVA-1.5's mixture.
    """
    for record in records(notes.find("dataset.json*", "*.json*"), "data", key="id"):
        with notes.guard():
            record.get("split")
            record.training("split", splits=("1", "train"))
            questions, answers = record.list("questions"), record.list("answers")
            if len(questions) != len(answers):
                raise BadRecordError(
                    "wrong answers",
                    f"{record.place} has {len(questions)} questions and {len(answers)} answers.",
                )
            number = record.text("id", "image_id")
            path = f"ocr_vqa/images/{number}.jpg"
            yield converse(notes.name, "ocr", number, path, _rounds(questions, answers))


def _rounds(questions: list, answers: list) -> list[tuple[str, str]]:
    first = short_answer(str(questions[0])) if questions else ""
    return list(zip([first, *map(str, questions[1:])], map(str, answers)))


def chartqa(notes: Annotations) -> Iterator[Conversation]:
    """ChartQA (https://github.com/vis-nlp/ChartQA), human and augmented questions."""
    for path in notes.find_all("train_*.json*", "*train*.json*"):
        for i, record in enumerate(records(path, "data")):
            with notes.guard():
                image = f"chartqa/train/png/{record.text('imgname', 'image')}"
                rounds = [(short_answer(record.text("query", "question")), answer_of(record))]
                number = f"{path.name.partition('.')[0]}-{i}"
                yield converse(notes.name, "ocr", number, image, rounds)


def docvqa(notes: Annotations) -> Iterator[Conversation]:
    """DocVQA (https://www.docvqa.org): the most frequent answer, the first where all differ."""
    path = notes.find("train_v1.0_withQT.json*", "train_v1.0.json*", "*train*.json*")
    for record in records(path, "data"):
        yield from _document(notes, record, "image")


def infovqa(notes: Annotations) -> Iterator[Conversation]:
    """InfographicVQA (https://www.docvqa.org/datasets/infographicvqa), as DocVQA."""
    path = notes.find("infographicsVQA_train_v1.0.json*", "*train*.json*")
    for record in records(path, "data"):
        yield from _document(notes, record, "image_local_name")


def stvqa(notes: Annotations) -> Iterator[Conversation]:
    """ST-VQA, task 3 (https://rrc.cvc.uab.es/?ch=11); some of its pictures are COCO's."""
    for record in records(notes.find("train_task_3.json*", "*train*.json*"), "data"):
        yield from _document(notes, record, "file_path")


def _document(notes: Annotations, record: Record, image: str) -> Iterator[Conversation]:
    with notes.guard():
        record.training("data_split", "set_name")
        path = _under(notes.name, record.text(image, "image"))
        rounds = [(short_answer(record.text("question")), answer_of(record))]
        number = record.text("questionId", "question_id")
        yield converse(notes.name, "ocr", number, path, rounds)


def estvqa(notes: Annotations) -> Iterator[Conversation]:
    """EST-VQA (https://github.com/xinke-wang/EST-VQA), English and Chinese.

    ``{image, annotation: [{question, answer, evidence}]}`` is confirmed by public readers;
    ``evidence`` is the four corners of the words as text, and is not used.
    """
    files = notes.find_all("*train*.json*", "*.json*")
    for record in (record for path in files for record in records(path, "data", "annotations")):
        with notes.guard():
            image = record.text("image", "image_id")
            path = _under(notes.name, image if "." in image else f"{image}.jpg")
            several = record.has("annotation") or record.has("annotations")
            entries = record.children("annotation", "annotations") if several else [record]
            pairs = [(entry.text("question"), answer_of(entry)) for entry in entries]
            number = record.text("id", "question_id", "image", "image_id")
            questions, answers = [q for q, _ in pairs], [a for _, a in pairs]
            yield converse(notes.name, "ocr", number, path, _rounds(questions, answers))


def _under(folder: str, name: str) -> str:
    return f"{folder}/{name}" if "/" in name else f"{folder}/images/{name}"
