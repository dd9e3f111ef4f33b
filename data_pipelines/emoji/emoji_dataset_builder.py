"""The TFDS builder of the emoji set: ArrayRecord, readable by `tfds.data_source`.

``python -m data_pipelines.build emoji`` fetches the packages, runs this, and adds the tables.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines import records
from data_pipelines.datasets import BUILT, SPLITS
from data_pipelines.emoji.drawings import rasterise
from data_pipelines.emoji.fetch import PACKAGES
from data_pipelines.emoji.prepare import Drawing, Plan, make_plan


class Builder(tfds.core.GeneratorBasedBuilder):
    """Emoji drawings of four vendors with their names in 20 languages."""

    VERSION = tfds.core.Version(BUILT["emoji"])
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The npm archives that data_pipelines.emoji.fetch fetches."

    plan: Plan | None = None
    drawn: Callable[[], None] = staticmethod(lambda: None)
    """Called after each drawing, to report progress."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji of four vendors with names and keywords from Unicode CLDR.",
            features=tfds.features.FeaturesDict(records.features()),
            homepage="https://cldr.unicode.org",
            license="Apache-2.0, CC-BY-4.0, MIT (drawings), Unicode-3.0 (names)",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        if self.plan is None:
            folder = pathlib.Path(dl_manager.manual_dir)
            self.plan = make_plan({key: folder / pack.file for key, pack in PACKAGES.items()})
        return {name: self._generate_examples(self.plan.drawings[name]) for name in SPLITS}

    def _generate_examples(self, drawings: Sequence[Drawing]) -> Iterator[tuple[str, Any]]:
        plan = self.plan
        assert plan is not None  # _split_generators made it

        def draw(drawing: Drawing) -> bytes:
            return rasterise(plan.icons[drawing.vendor].svg(drawing.icon))

        # librsvg runs outside the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for drawing, png in zip(drawings, pool.map(draw, drawings)):
                concept = plan.concepts[drawing.concept]
                self.drawn()
                yield (
                    f"{concept.key}/{drawing.vendor}",
                    records.example(concept, drawing.vendor, png),
                )
