"""Pictures that belong to an evaluation set and so may be in no conversation.

COCO's pictures are shared by most sets, and a picture that one set trains on is another's test:
RefCOCO's val, testA and testB, RefCOCO+'s and RefCOCOg's val and test all lie in COCO's train2014.
What may be given is what says so itself: `collect`. The choice of files is ours, the paper says
only that training splits are used; leaving out the RefCOCO family's held-out pictures from its own
training expressions gives about the 284K expressions of the paper's Table 3 (inferred).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator

from data_pipelines.dialogue import pickles
from data_pipelines.dialogue.annotations import Record, records
from data_pipelines.dialogue.pictures import coco, key
from data_pipelines.sample import BadRecordError

TRAINING = ("train", "restval")
AUTOMATIC = (
    "dataset_coco.json",
    "coco_karpathy_val.json",
    "coco_karpathy_test.json",
    "captions_val2017.json",
    "instances_val2017.json",
    "image_info_test*.json",
    "refs(*).p",
    "testdev_*_questions.json",
    "val_balanced_questions.json",
    "test_balanced_questions.json",
    "ocrvqa/dataset.json",
    "ai2d_test_ids.csv",
    "TextCaps_0.1_val.json",
    "TextVQA_0.5.1_val.json",
    "image_data.json",
    "held_out*.txt",
)
"""Names that `find` looks for. COCO's val2014 is not among them: the Karpathy split trains on most
of it."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Pictures to leave out.

    Attributes:
        keys: as `pictures.key` names them.
        files: how many each file named.
    """

    keys: frozenset[str] = frozenset()
    files: tuple[tuple[str, int], ...] = ()


def find(root: str | pathlib.Path) -> list[pathlib.Path]:
    """The files under a folder that say which pictures are held out.

    Args:
        root: searched itself and two levels below.

    Returns:
        Paths, sorted.
    """
    base = pathlib.Path(root)
    found = {
        path
        for name in AUTOMATIC
        for depth in ("", "*/", "*/*/")
        for path in base.glob(depth + name)
        if path.is_file()
    }
    return sorted(found)


def collect(paths: Iterable[str | pathlib.Path]) -> HeldOut:
    """Reads which pictures are held out.

    Args:
        paths: any of RefCOCO's ``refs(…).p`` (all splits but train); Karpathy's
            ``dataset_coco.json`` (val and test) or lists of ``{image}``; COCO's annotations or
            image lists (every picture); GQA's questions (every picture: give val, testdev, test);
            OCR-VQA's ``dataset.json`` (splits 2 and 3); ``ai2d_test_ids.csv``; TextCaps' or
            TextVQA's records with a ``set_name`` that is not train; Visual Genome's
            ``image_data.json``, by which a picture held out of COCO is held out of Visual Genome
            and GQA, and the other way round; a ``.txt`` of paths or keys.

    Returns:
        The pictures.

    Raises:
        ValueError: if a file is damaged or tells of no picture.
    """
    keys: set[str] = set()
    files, tables = [], []
    for path in map(pathlib.Path, paths):
        if path.name == "image_data.json":
            tables.append(path)
            continue
        named = set(_named(path))
        if not named:
            raise ValueError(f"{path} tells of no held-out picture; see held_out.collect.")
        files.append((str(path), len(named)))
        keys |= named
    for path in tables:
        same = set(_same(path, keys))
        files.append((str(path), len(same - keys)))
        keys |= same
    return HeldOut(frozenset(keys), tuple(files))


def _named(path: pathlib.Path) -> Iterator[str]:
    if path.suffix in (".p", ".pkl", ".pickle"):
        for ref in pickles.load(path):
            record = Record(ref, path.name)
            try:
                if record.text("split") not in TRAINING:
                    yield key(coco(record.integer("image_id")))
            except BadRecordError as error:
                raise ValueError(f"{error} It is no file of referring expressions.") from None
    elif path.suffix in (".txt", ".csv"):
        for line in path.read_text(encoding="utf-8").split():
            if path.suffix == ".csv":
                yield f"ai2d:{line.strip(',').removesuffix('.png')}"
            else:
                yield line if ":" in line else key(line)
    else:
        for record in records(path, "images", "data", "questions", "annotations", key="id"):
            name = _of(record)
            if name:
                yield name


def _of(record: Record) -> str | None:
    if not isinstance(record.data, dict):
        return None
    split = str(record.data.get("split", record.data.get("set_name", "held out")))
    if split in TRAINING or (record.has("imageURL") and split == "1"):
        return None
    if record.has("imageURL"):
        return f"ocr_vqa:{record.text('id')}"
    if record.has("cocoid"):
        return key(coco(record.integer("cocoid")))
    if record.has("imageId"):
        return key(f"gqa/images/{record.text('imageId')}.jpg")
    if record.has("image"):
        return key(f"coco/{record.text('image')}")
    if record.has("set_name") and record.has("image_id"):
        return f"textvqa:{record.text('image_id')}"
    if record.has("file_name") and record.has("id"):
        return key(coco(record.integer("id")))
    if record.has("image_id"):
        return key(coco(record.integer("image_id")))
    return None


def _same(path: pathlib.Path, keys: set[str]) -> Iterator[str]:
    for record in records(path):
        if record.has("coco_id") and record.has("image_id"):
            pair = {f"vg:{record.integer('image_id')}", f"coco:{record.integer('coco_id')}"}
            if pair & keys:
                yield from pair
