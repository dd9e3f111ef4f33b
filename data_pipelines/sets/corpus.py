"""A corpus on disk or in a bucket: pairs or conversations, read as they are drawn."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipelines.sample import BadRecordError, Caption, Sample, Turn
from internvl_jax.batch import IMAGE_PLACEHOLDER

SPLIT = "validation"
ATTEMPTS = 8


@runtime_checkable
class Records(Protocol):
    """What is asked of a corpus (`manifest.Corpus`).

    Attributes:
        folder: where it is.
        kind: "pairs" or "conversations".
        ends: [shards] int64, cumulative records.
        digest: names its content.
    """

    @property
    def folder(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def ends(self) -> np.ndarray: ...
    @property
    def digest(self) -> str: ...

    def sample(self, index: int) -> Sample:
        """Reads a record. Raises BadRecordError if it cannot be used."""
        ...

    def close(self) -> None:
        """Closes the open files; a later read opens them again."""
        ...


class CorpusSet:
    """A unit is a record of a corpus."""

    def __init__(self, corpus: Records, stage: str, near: bool = False):
        """Draws from an open corpus; `open` is the usual way here.

        Args:
            corpus: the records.
            stage: one of `internvl_jax.batch.STAGES`.
            near: negatives come from the file that is being read, where they can.

        Raises:
            ValueError: if the corpus holds conversations and the stage needs captions.
        """
        if corpus.kind == "conversations" and stage in ("contrastive", "generative"):
            raise ValueError(
                f"{corpus.folder} holds conversations, but the {stage} stage needs captions; name "
                "a corpus of pairs."
            )
        self.corpus, self._stage, self._near = corpus, stage, near
        self.ends, self.digest = corpus.ends, corpus.digest
        self.records = len(self)

    @classmethod
    def open(cls, folder: str, stage: str, split: str, near: bool = False) -> CorpusSet:
        """Opens a folder that `data_pipelines.build` wrote.

        Args:
            folder: where the manifest is; that of the validation split is in ``validation`` in it.
            stage: one of `internvl_jax.batch.STAGES`.
            split: "train" or "validation".
            near: see above.

        Returns:
            The set.

        Raises:
            FileNotFoundError: if there is no manifest.
            ValueError: if it is damaged, or the corpus does not suit the stage.
        """
        from data_pipelines.manifest import open_corpus

        if split == SPLIT:
            folder = posixpath.join(folder, SPLIT)
        return cls(open_corpus(folder), stage, near)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def draw(self, unit: int, rng: np.random.Generator) -> tuple[int, Sequence[Sample]]:
        """One record, with another's caption in the generative stage.

        Args:
            unit: its number.
            rng: source of randomness.

        Returns:
            The number and the sample.

        Raises:
            BadRecordError: if the record cannot be used.
        """
        sample = self.corpus.sample(unit)
        if self._stage == "finetune" and not sample.turns:
            text = sample.captions[int(rng.integers(len(sample.captions)))].text
            turns = (Turn("human", IMAGE_PLACEHOLDER), Turn("gpt", text))
            sample = dataclasses.replace(sample, captions=(), turns=turns)
        if self._stage == "generative":
            sample = dataclasses.replace(sample, negative=self._negative(unit, sample, rng))
        return unit, (sample,)

    def close(self) -> None:
        """Closes the corpus' open files; a later draw opens them again."""
        self.corpus.close()

    def _negative(self, unit: int, sample: Sample, rng: np.random.Generator) -> Caption:
        """A caption of a record drawn evenly (negatives are not mined, spec 3.1).

        Where records are read file by file, of a record of the same file: one from anywhere would
        open another file for every example. Half of the attempts leave the file all the same, for
        files of one caption.
        """
        own = {caption.text for caption in sample.captions}
        for attempt in range(ATTEMPTS):
            first, last = 0, len(self)
            if self._near and attempt < ATTEMPTS // 2:
                shard = int(np.searchsorted(self.ends, unit, "right"))
                first, last = int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])
            try:
                other = self.corpus.sample(int(rng.integers(first, last))).captions
            except BadRecordError:
                continue
            caption = other[int(rng.integers(len(other)))]
            if caption.text not in own:
                return caption
        raise BadRecordError(
            "no negative",
            f"{ATTEMPTS} records drawn in a row have no other caption than {sample.key}.",
        )
