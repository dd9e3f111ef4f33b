"""The record of a picture with its names, as TFDS writes it.

image (64 x 64 PNG), vendor, concept (its key), group, names and keywords by language ("" where
there is none; keywords joined by " | " as CLDR writes them).
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.datasets import SPLITS, Concept, write_tables
from internvl_jax.batch import LANGUAGES

SIZE = 64
SEPARATOR = " | "


def features() -> dict[str, Any]:
    """What `tfds.features.FeaturesDict` takes.

    Returns:
        Field -> feature.
    """
    import tensorflow_datasets as tfds

    def texts() -> dict[str, Any]:
        return {language: tfds.features.Text() for language in LANGUAGES}

    return {
        "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
        "vendor": tfds.features.Text(),
        "concept": tfds.features.Text(),
        "group": tfds.features.Text(),
        "names": texts(),
        "keywords": texts(),
    }


def example(concept: Concept, vendor: str, png: bytes) -> dict[str, Any]:
    """One record.

    Args:
        concept: what the picture shows.
        vendor: who drew it.
        png: the picture, encoded (an array would need TensorFlow to be encoded).

    Returns:
        Field -> value, as `features` says.
    """
    return {
        "image": io.BytesIO(png),
        "vendor": vendor,
        "concept": concept.key,
        "group": concept.group,
        "names": {language: concept.names.get(language, "") for language in LANGUAGES},
        "keywords": {
            language: SEPARATOR.join(concept.keywords.get(language, ())) for language in LANGUAGES
        },
    }


def finish(folder: pathlib.Path, concepts: Sequence[Concept], counts: Mapping[str, int]) -> None:
    """Reads every record of a prepared folder once and writes the tables beside them.

    Args:
        folder: that TFDS prepared.
        concepts: the table of concepts.
        counts: split -> records expected.

    Raises:
        ValueError: if a record is missing or names an unknown concept.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    from data_pipelines.sources.tfds import parse

    number = {concept.key: i for i, concept in enumerate(concepts)}
    files: dict[str, list[tuple[str, int]]] = {}
    shown, vendors = [], []
    for split in SPLITS:
        files[split] = []
        for path in sorted(folder.glob(f"*-{split}.array_record-*")):
            reader = ArrayRecordReader(str(path))
            records = reader.read_all()
            reader.close()
            files[split].append((path.name, len(records)))
            for record in records:
                shown.append(number[parse(record, "concept").decode()])
                vendors.append(parse(record, "vendor").decode())
        found = sum(count for _, count in files[split])
        if found != counts[split]:
            raise ValueError(
                f"{folder} holds {found} records of the split {split!r} instead of "
                f"{counts[split]}; delete the folder and build it again."
            )
    write_tables(folder, concepts, files, shown, vendors)
