"""The prepared sets of pictures and names, and how one is opened.

A set is pictures (encoded, by number), a table of the concepts they show, and splits:

============  ====================================================================
train         drawings that are trained on
validation    drawings of the training vendors kept back, of concepts seen in train: for tuning
unseen        the training vendors' drawings of concepts that are in no training data
held_out      another vendor's drawings, of seen and unseen concepts: for judging, once
============  ====================================================================
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.sources import Source

SPLITS = ("train", "validation", "unseen", "held_out")
CONCEPTS_FILE = "concepts.json"
PICTURES_FILE = "pictures.json"
TOKENIZER_FILE = "tokenizer.model"
BUILT = {"emoji": "1.0.0", "shapes": "1.0.0"}
"""Sets that `data_pipelines.build` makes, and their versions, as TFDS lays them out."""


@dataclasses.dataclass(frozen=True)
class Concept:
    """What a picture shows, with its names.

    Attributes:
        key: stable identifier, e.g. the code points "1f408".
        group: kind of thing, e.g. "Animals & Nature".
        names: language code -> name.
        keywords: language code -> keywords.
        unseen: in no vendor's training data.
        judged: on the fixed list that the headline figure is computed on.
    """

    key: str
    group: str
    names: Mapping[str, str]
    keywords: Mapping[str, tuple[str, ...]]
    unseen: bool = False
    judged: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared set.

    Attributes:
        name: what it is called.
        pictures: encoded pictures by record number.
        concept: [n] int32, the concept each record shows.
        vendor: [n] names, who drew each record.
        concepts: the table of concepts.
        splits: split -> record numbers [.] int64, ascending.
    """

    name: str
    pictures: Source[bytes]
    concept: np.ndarray
    vendor: tuple[str, ...]
    concepts: tuple[Concept, ...]
    splits: Mapping[str, np.ndarray]

    def training_concepts(self) -> list[Concept]:
        """The concepts whose texts and pictures may be trained on."""
        return [concept for concept in self.concepts if not concept.unseen]


def open_dataset(name: str, data_dir: str | pathlib.Path = "data") -> Dataset:
    """Opens a prepared set.

    Args:
        name: "emoji", "shapes" (drawn on the spot, no files), or the folder of a prepared set
            (where its `concepts.json` is).
        data_dir: where sets were built.

    Returns:
        The set; pictures are read when asked for.

    Raises:
        FileNotFoundError: if it has not been built.
    """
    folder = folder_of(name, data_dir)
    if name == "shapes":
        from data_pipelines.shapes.draw import make_dataset

        return make_dataset()
    if not (folder / PICTURES_FILE).is_file():
        raise FileNotFoundError(
            f"The data set {name!r} is not prepared in {folder}; run python -m "
            f"data_pipelines.build emoji --data_dir {data_dir}."
        )
    return read_folder(name, folder)


def folder_of(name: str, data_dir: str | pathlib.Path = "data") -> pathlib.Path:
    """Where a set lies.

    Args:
        name: "emoji", "shapes", or a folder.
        data_dir: where sets are built.

    Returns:
        The folder, which need not exist.
    """
    if name in BUILT:
        return pathlib.Path(data_dir) / name / BUILT[name]
    return pathlib.Path(name)


def tokenizer_of(name: str, data_dir: str | pathlib.Path = "data") -> pathlib.Path:
    """The tokenizer that was trained with a set.

    Args:
        name: "emoji", "shapes", or a folder.
        data_dir: where sets are built.

    Returns:
        The file, which need not exist.
    """
    return folder_of(name, data_dir) / TOKENIZER_FILE


def read_folder(name: str, folder: pathlib.Path) -> Dataset:
    """Reads the tables of a prepared folder (see `write_tables`).

    Args:
        name: what to call the set.
        folder: holds the tables and the record files they list.

    Returns:
        The set.
    """
    from data_pipelines.sources.array_record import ArrayRecordSource
    from data_pipelines.sources.tfds import PictureSource

    concepts = json.loads((folder / CONCEPTS_FILE).read_text("utf-8"))
    table = json.loads((folder / PICTURES_FILE).read_text("utf-8"))
    records = ArrayRecordSource([(folder / file, count) for file, count in table["files"]])
    splits = {
        split: np.arange(start, stop, dtype=np.int64)
        for split, (start, stop) in table["splits"].items()
    }
    return Dataset(
        name=name,
        pictures=PictureSource(records),
        concept=np.asarray(table["concept"], np.int32),
        vendor=tuple(table["vendor"]),
        concepts=tuple(_concept(entry) for entry in concepts),
        splits=splits,
    )


def _concept(entry: Mapping) -> Concept:
    keywords = {language: tuple(words) for language, words in entry["keywords"].items()}
    return Concept(**{**entry, "keywords": keywords})


def write_tables(
    folder: pathlib.Path,
    concepts: Sequence[Concept],
    files: Mapping[str, Sequence[tuple[str, int]]],
    concept: Sequence[int],
    vendor: Sequence[str],
) -> None:
    """Writes the tables beside the record files; the table of pictures last.

    Args:
        folder: of the prepared set.
        concepts: the table of concepts.
        files: split -> (file name, number of records), in the order of the records.
        concept: of every record, in that order.
        vendor: of every record, in that order.
    """
    splits, end = {}, 0
    for split, parts in files.items():
        start, end = end, end + sum(count for _, count in parts)
        splits[split] = (start, end)
    table = {
        "files": [part for parts in files.values() for part in parts],
        "splits": splits,
        "concept": list(concept),
        "vendor": list(vendor),
    }
    _write(folder / CONCEPTS_FILE, [dataclasses.asdict(entry) for entry in concepts])
    _write(folder / PICTURES_FILE, table)


def _write(path: pathlib.Path, value: object) -> None:
    writing = path.with_suffix(".tmp")
    writing.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    writing.replace(path)
