"""Grounding and grounded captioning: RefCOCO, RefCOCO+, RefCOCOg and Toloka."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from data_pipelines.dialogue import pickles
from data_pipelines.dialogue.annotations import Annotations, Record, opened, records
from data_pipelines.dialogue.boxes import box_text, normalise
from data_pipelines.dialogue.conversation import Conversation, converse
from data_pipelines.dialogue.pictures import coco
from data_pipelines.dialogue.prompts import DESCRIBE, LOCATE, LOCATE_ANSWER, sentence


def refcoco(notes: Annotations) -> Iterator[Conversation]:
    """RefCOCO, RefCOCO+ or RefCOCOg (https://github.com/lichengunc/refer), split train.

    Every expression becomes two conversations: locate it, and describe its box. The paper counts
    both (Table 3: 284K descriptions; 284K and Toloka's 39K to locate), and prints no prompts: they
    are LLaVA-1.5's, as is the form of the phrases ("Lady in blue."). RefCOCOg is read in its
    ``umd`` split, whose pictures do not overlap, where it is there.
    """
    path = notes.find("refs(unc).p", "refs(umd).p", "refs(google).p", "refs*.p", "refs*.json*")
    sizes: dict[int, tuple[float, float]] = {}
    boxes: dict[int, list[float]] = {}
    for record in records(notes.find("instances.json*"), "images", "annotations"):
        with notes.guard():
            if record.has("bbox"):
                x, y, w, h = record.numbers(4, "bbox")
                boxes[record.integer("id")] = [x, y, x + w, y + h]
            else:
                sizes[record.integer("id")] = record.number("width"), record.number("height")
    refs = records(path) if ".json" in path.name else _refs(path)
    for ref in refs:
        with notes.guard():
            ref.get("split")
            ref.training("split")
            image = ref.integer("image_id")
            found = Record(
                {"bbox": boxes.get(ref.integer("ann_id")), "picture": sizes.get(image)},
                f"{ref.place}, in instances.json",
            )
            size = found.get("picture")
            box = normalise(found.numbers(4, "bbox"), *size, square=notes.square, place=ref.place)
            text = box_text(box)
            for i, words in enumerate(ref.list("sentences")):
                spoken = (
                    words
                    if isinstance(words, str)
                    else Record(words, ref.place).text("sent", "raw")
                )
                phrase = sentence(spoken)
                number = f"{ref.text('ref_id')}-{i}"
                for task, question, answer in (
                    ("grounding", LOCATE.format(text=phrase), text),
                    ("grounded_captioning", DESCRIBE.format(box=text), phrase),
                ):
                    kind = "locate" if task == "grounding" else "describe"
                    rounds = [(question, answer)]
                    yield converse(
                        notes.name, task, f"{number}-{kind}", coco(image), rounds, box=box
                    )


def _refs(path) -> Iterator[Record]:
    refs = pickles.load(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} holds {type(refs).__name__}, not a list of expressions.")
    for i, ref in enumerate(refs):
        yield Record(ref, f"{path.name}, record {i}")


def toloka(notes: Annotations) -> Iterator[Conversation]:
    """Toloka's WSDM Cup 2023 (https://huggingface.co/datasets/toloka/WSDMCup2023): box answers.

    ``left, top, right, bottom`` are pixels. The prompt after the question is ours. Pictures are
    named by the end of their address, which is COCO's number.
    """
    path = notes.find("train.csv*", "*train*.csv*")
    with opened(path, newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            record = Record({k: v for k, v in row.items() if v != ""}, f"{path.name}, row {i + 1}")
            with notes.guard():
                box = normalise(
                    [record.number(side) for side in ("left", "top", "right", "bottom")],
                    record.number("width"),
                    record.number("height"),
                    square=notes.square,
                    place=record.place,
                )
                name = record.text("image").partition("?")[0].rpartition("/")[2]
                rounds = [(f"{record.text('question')}\n{LOCATE_ANSWER}", box_text(box))]
                name = f"toloka/images/{name}"
                yield converse(notes.name, "grounding", i, name, rounds, box=box)
