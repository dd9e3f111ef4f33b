"""Captioning: COCO Caption and TextCaps."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipelines.dialogue.annotations import Annotations, Record, records
from data_pipelines.dialogue.conversation import Conversation, converse
from data_pipelines.dialogue.held_out import TRAINING
from data_pipelines.dialogue.pictures import coco
from data_pipelines.dialogue.prompts import CAPTION


def coco_caption(notes: Annotations) -> Iterator[Conversation]:
    """COCO Caption (https://cocodataset.org), one conversation a caption.

    Reads the Karpathy split as ``coco_karpathy_train.json`` (a list of ``{image, caption,
    image_id}``) or ``dataset_coco.json`` (train and restval), or COCO's own
    ``captions_train2014.json``. The Karpathy split's 566,747 captions and TextCaps' 21,953
    pictures are the 588K of the paper's Table 3 (inferred from the sum).
    """
    path = notes.find("coco_karpathy_train.json*", "dataset_coco.json*", "captions_train20*.json*")
    year = re.search(r"train\d{4}", path.name)
    split = year[0] if year else "train2014"
    for i, record in enumerate(records(path, "annotations", "images")):
        if record.has("file_name"):  # COCO's list of pictures: the captions name them as well
            continue
        with notes.guard():
            record.training("split", splits=TRAINING)
            image = _picture(record, split)
            for j, caption in enumerate(_captions(record)):
                name = record.text("id") if record.has("id") else f"{i}-{j}"
                yield converse(notes.name, "captioning", name, image, [(CAPTION, caption)])


def _picture(record: Record, split: str) -> str:
    if record.has("cocoid"):
        return coco(record.integer("cocoid"), record.text("filepath"))
    if record.has("image"):
        return f"coco/{record.text('image')}"
    return coco(record.integer("image_id"), split)


def _captions(record: Record) -> list[str]:
    if record.has("sentences"):
        return [sentence.text("raw", "caption") for sentence in record.children("sentences")]
    if isinstance(record.get("caption"), list):
        return [str(caption) for caption in record.list("caption")]
    return [record.text("caption")]


def textcaps(notes: Annotations) -> Iterator[Conversation]:
    """TextCaps (https://textvqa.org/textcaps), one conversation a picture, its first caption.

    One of five, as in LLaVA-1.5's mixture and, by the sum, in the paper's (see `coco_caption`).
    """
    seen = set()
    for record in records(notes.find("TextCaps_0.1_train.json*", "*train*.json*"), "data"):
        with notes.guard():
            image = record.text("image_id")
            if image in seen:
                continue
            record.training("set_name")
            if record.has("caption_str"):
                caption = record.text("caption_str")
            else:
                caption = next(iter(map(str, record.list("reference_strs", "captions"))), "")
            path = f"textvqa/train_images/{image}.jpg"
            yield converse(notes.name, "captioning", image, path, [(CAPTION, caption)])
            seen.add(image)
