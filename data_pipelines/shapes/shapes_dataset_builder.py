"""The TFDS builder of the shapes: the emoji set's format without a download, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines import records
from data_pipelines.datasets import BUILT
from data_pipelines.image import encode_png
from data_pipelines.shapes.draw import draw, make_concepts, make_records


class Builder(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes with their names in five languages."""

    VERSION = tfds.core.Version(BUILT["shapes"])

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Generated shapes in six colours with names in five languages.",
            features=tfds.features.FeaturesDict(records.features()),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(part) for name, part in make_records().items()}

    def _generate_examples(self, part: list[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
        concepts = make_concepts()
        for number, vendor in part:
            concept = concepts[number]
            png = encode_png(draw(concept, vendor))
            yield f"{concept.key}/{vendor}", records.example(concept, vendor, png)
