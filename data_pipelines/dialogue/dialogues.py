"""Conversation: LLaVA-150K, Mix-665K, SVIT, VisDial, LRV; and LLaVAR, which counts as OCR."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from data_pipelines.dialogue.annotations import Annotations, Record, records
from data_pipelines.dialogue.boxes import box_text, normalise
from data_pipelines.dialogue.conversation import Conversation, converse, relative
from data_pipelines.dialogue.pictures import coco
from data_pipelines.sample import BadRecordError, Turn
from internvl_jax.batch import IMAGE_PLACEHOLDER

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def llava(record: Record, source: str, task: str, folder: str = "") -> Conversation:
    """A record in LLaVA's format (https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data).

    A picture without "<image>" is put in front; answers before the first question and a question
    without an answer at the end are dropped, as LLaVA's own reader does.

    Args:
        record: ``{id, image?, conversations: [{from, value}]}``; no image is text only.
        source: name of the set.
        task: of the set.
        folder: put in front of the paths.

    Returns:
        The conversation.

    Raises:
        BadRecordError: if turns do not alternate, are empty, or do not fit the pictures.
    """
    paths = []
    if record.has("image"):
        value = record.get("image")
        named = [str(path) for path in value] if isinstance(value, list) else [str(value)]
        paths = [relative(f"{folder}{path}", record.place) for path in named]
    turns = []
    for entry in record.children("conversations", "conversation"):
        role = ROLES.get(entry.text("from", "role"), "")
        value = entry.text("value", "content")
        if not turns and role == "gpt":
            continue
        if role != ("human" if len(turns) % 2 == 0 else "gpt"):
            raise BadRecordError("turns", f"{entry.place} is not the turn of {role or 'anyone'!r}.")
        if not value.replace(IMAGE_PLACEHOLDER, "").strip():
            raise BadRecordError("empty turn", f"{entry.place} is empty.")
        turns.append(Turn(role, value))
    if len(turns) % 2:
        turns.pop()
    if not turns:
        raise BadRecordError("no question", f"{record.place} has no question with an answer.")
    asked = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if paths and not asked:
        turns[0] = Turn("human", f"{IMAGE_PLACEHOLDER}\n" * len(paths) + turns[0].value)
    elif asked != len(paths):
        raise BadRecordError(
            "pictures", f"{record.place} has {len(paths)} pictures for {asked} {IMAGE_PLACEHOLDER}."
        )
    number = record.text("id") if record.has("id") else record.place.rpartition(" ")[2]
    return Conversation(number, source, task, tuple(paths), tuple(turns))


def llava_150k(notes: Annotations) -> Iterator[Conversation]:
    """LLaVA-Instruct-150K (https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K)."""
    path = notes.find("llava_instruct_150k.json*", "*150k*.json*", "*.json*")
    for record in records(path, "data"):
        with notes.guard():
            bare = record.has("image") and "/" not in str(record.get("image"))
            folder = "coco/train2017/" if bare else ""
            yield llava(record, notes.name, "conversation", folder)


def mix665k(notes: Annotations) -> Iterator[Conversation]:
    """LLaVA-1.5's mixture (``llava_v1_5_mix665k.json``), its text-only records included."""
    for record in records(notes.find("llava_v1_5_mix665k.json*", "*mix665k*.json*"), "data"):
        with notes.guard():
            yield llava(record, notes.name, "conversation")


def llavar(notes: Annotations) -> Iterator[Conversation]:
    """LLaVAR's 20K (https://huggingface.co/datasets/SALT-NLP/LLaVAR): text-rich pictures.

    The published file holds LLaVA's 150K as well, and names its own pictures like COCO's; its
    authors say to remove what LLaVA's file contains, so that file must lie beside it.
    """
    path = notes.find("llava_instruct_150k_llavar_20k.json*", "*llavar*.json*")
    known: set[bytes] = set()
    if "150k" in path.name:
        beside = notes.find("llava_instruct_150k.json*")
        known = {_digest(record) for record in records(beside, "data")}
    for record in records(path, "data"):
        if _digest(record) in known:
            continue
        with notes.guard():
            yield llava(record, notes.name, "ocr", "llavar/images/")


def _digest(record: Record) -> bytes:
    turns = record.data.get("conversations") if isinstance(record.data, dict) else record.data
    # Mirrors differ in where "<image>" stands.
    text = re.sub(r"<image>|\s", "", json.dumps(turns).replace("\\n", ""))
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def lrv(notes: Annotations) -> Iterator[Conversation]:
    """LRV-Instruction (https://github.com/FuxiaoLiu/LRV-Instruction), charts included.

    ``{image_id, question, answer}``: Visual Genome's number, or for charts a file name.
    """
    for path in notes.find_all("filter_cap*.json*", "chart_release*.json*", "*.json*"):
        yield from _lrv(notes, path)
    if any(path.name.startswith("filter_cap") for path in notes.files):
        for path in notes.find_all("chart_release*.json*", optional=True):
            yield from _lrv(notes, path)


def _lrv(notes: Annotations, path) -> Iterator[Conversation]:
    for i, record in enumerate(records(path, "data")):
        with notes.guard():
            image = record.text("image_id", "image")
            image = image if "." in image else f"{image}.jpg"
            rounds = [(record.text("question"), record.text("answer"))]
            number = f"{path.name.partition('.')[0]}-{i}"
            yield converse(notes.name, "conversation", number, f"lrv/{image}", rounds)


_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(\d*\.?\d+)"] * 4) + r"\s*\]")


def svit(notes: Annotations) -> Iterator[Conversation]:
    """SVIT (https://huggingface.co/datasets/BAAI/SVIT) on Visual Genome's pictures.

    Its own layout ``{image_id, conversations: [{content: [{from: user, value}, …]}]}`` (confirmed
    by a public reader) or LLaVA's. Referring questions mark objects, "<st>cup<ed> [x1, y1, x2,
    y2]": the marks are dropped, and the boxes, shares of the picture's sides (remembered, not
    confirmed), are written in our frame, for which Visual Genome's ``image_data.json`` must lie
    beside it.
    """
    sizes: dict[str, tuple[float, float]] = {}
    for path in notes.find_all("image_data.json*", optional=True):
        for record in records(path):
            with notes.guard():
                sizes[record.text("image_id", "id")] = (
                    record.number("width"),
                    record.number("height"),
                )
    names = ("svit.json*", "conversation.json*", "complex_reasoning.json*")
    names += ("detail_description.json*", "referring_qa.json*")
    files = notes.find_all(names[0], optional=True) or [
        path for name in names[1:] for path in notes.find_all(name, optional=True)
    ]
    for path in files or notes.find_all("*svit*.json*"):
        for record in records(path, "data"):
            yield from _svit(notes, record, sizes)


def _svit(
    notes: Annotations, record: Record, sizes: dict[str, tuple[float, float]]
) -> Iterator[Conversation]:
    with notes.guard():
        if record.has("image"):
            yield llava(record, notes.name, "conversation")
            return
        image = record.text("image_id")
        path = f"vg/VG_100K/{image}.jpg"
        for i, talk in enumerate(record.children("conversations")):
            with notes.guard():
                turns = [
                    {"from": turn.text("from"), "value": _unmark(notes, turn, sizes.get(image))}
                    for turn in talk.children("content")
                ]
                data = {"id": f"{image}-{i}", "image": path, "conversations": turns}
                entry = Record(data, talk.place)
                yield llava(entry, notes.name, "conversation")


def _unmark(notes: Annotations, turn: Record, size: tuple[float, float] | None) -> str:
    text = turn.text("value")
    if "<st>" not in text:
        return text
    if size is None:
        raise BadRecordError("picture size", f"{turn.place} has boxes, its picture no known size.")
    width, height = size

    def rewrite(match: re.Match) -> str:
        box = [float(v) * side for v, side in zip(match.groups(), (width, height) * 2)]
        return box_text(normalise(box, width, height, square=notes.square, place=turn.place))

    return _BOX.sub(rewrite, text.replace("<st>", "").replace("<ed>", ""))


def visdial(notes: Annotations) -> Iterator[Conversation]:
    """VisDial 1.0 (https://visualdialog.org): ten short rounds about a COCO picture.

    Questions and answers are indices into shared lists. The lists lack question marks, which are
    put back (ours); the caption that the questioner saw is not used.
    """
    path = notes.find("visdial_1.0_train.json*", "*train*.json*")
    data = _whole(path)
    questions, answers = (data.list(name) for name in ("questions", "answers"))
    for dialog in data.children("dialogs"):
        with notes.guard():
            rounds = []
            for turn in dialog.children("dialog"):
                question = str(_at(questions, turn, "question")).strip()
                if question and question[-1] not in "?.!":
                    question += "?"
                rounds.append((question, str(_at(answers, turn, "answer"))))
            image = dialog.integer("image_id")
            yield converse(notes.name, "conversation", image, coco(image), rounds)


def _whole(path) -> Record:
    # The shared lists may stand after the dialogs, so this file is held whole.
    for record in records(path, key="name"):
        if record.text("name") == "data":
            return record
    raise ValueError(f"{path} has no 'data' with questions, answers and dialogs.")


def _at(texts: list, turn: Record, name: str) -> object:
    index = turn.integer(name)
    if not 0 <= index < len(texts):
        raise BadRecordError(f"wrong {name}", f"{turn.place} names {name} {index} of {len(texts)}.")
    return texts[index]
