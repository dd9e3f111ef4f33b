"""Sets: what a pipeline draws samples from.

==========================  ===================================================================
`concepts.Concepts`         pictures of concepts with names in many languages (``emoji``,
                            ``shapes``): captions and questions are made on the spot
`corpus.CorpusSet`          a folder with a manifest: pairs or conversations of any number
`packed.PackedSet`          several conversations of such a folder a row
==========================  ===================================================================
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sample import Sample
from data_pipelines.text import Tokenizer


@runtime_checkable
class Set(Protocol):
    """Samples by number.

    Attributes:
        ends: [shards] int64, cumulative units; one shard where there are no files to speak of.
        records: numbers that `draw` may name.
        digest: changes when the set does.
    """

    ends: np.ndarray
    records: int
    digest: str

    def __len__(self) -> int:
        """Units, of which an epoch meets each once."""
        ...

    def draw(self, unit: int, rng: np.random.Generator) -> tuple[int, Sequence[Sample]]:
        """The record's number, and what makes one example: a sample, or those packed in a row.

        Raises:
            BadRecordError: if it cannot be used.
        """
        ...

    def close(self) -> None:
        """Closes the open files; a later draw opens them again."""
        ...


def open_set(path: str, stage: str, split: str, config: DataConfig, tokenizer: Tokenizer) -> Set:
    """Opens a set for a stage.

    Args:
        path: "emoji", "shapes", or a folder (``gs://`` as well) that `data_pipelines.build` wrote.
        stage: one of `internvl_jax.batch.STAGES`.
        split: "train" or "validation".
        config: the data settings.
        tokenizer: of the model that is trained.

    Returns:
        The set.

    Raises:
        FileNotFoundError: if it has not been built.
        ValueError: if it does not suit the stage or the settings.
    """
    from data_pipelines.datasets import BUILT, PICTURES_FILE

    if path in BUILT or (pathlib.Path(path) / PICTURES_FILE).is_file():
        from data_pipelines.sets.concepts import Concepts

        return Concepts.open(path, stage, split, config)
    from data_pipelines.sets.corpus import CorpusSet
    from data_pipelines.sets.packed import PackedSet

    corpus = CorpusSet.open(path, stage, split, near=config.order == "window")
    return PackedSet.open(corpus, config, tokenizer) if config.pack else corpus
