"""Pictures of concepts: captions in many languages and questions, made on the spot."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept, Dataset, open_dataset
from data_pipelines.image import decode
from data_pipelines.sample import Caption, Sample, Turn
from data_pipelines.sets.captions import (
    choose,
    choose_language,
    fits,
    keyword_caption,
    other_concept,
    training_pool,
)
from data_pipelines.sets.questions import conversation, converse
from internvl_jax.batch import (
    IMAGE_PLACEHOLDER,
    LANGUAGES,
    SUMMARIZE,
    TEMPLATES,
    caption_prompt,
)

TEXTS = ("name", "keywords", "caption", "summarize", "translation", "dialogue")
"""Kinds of text of the language stage."""


class Pictures:
    """Decoded pictures of a set, kept in memory while there is room.

    Under a global shuffle every record is equally likely to come next, so nothing is evicted.
    """

    def __init__(self, dataset: Dataset, cache_bytes: int):
        """Wraps the pictures.

        Args:
            dataset: the set.
            cache_bytes: memory for decoded pictures.
        """
        self._source, self._room = dataset.pictures, cache_bytes
        self._cache: dict[int, np.ndarray] = {}

    def __getitem__(self, record: int) -> np.ndarray:
        """Decodes one picture.

        Args:
            record: its number.

        Returns:
            [H,W,3] uint8, not to be written to.

        Raises:
            BadImageError: if it cannot be decoded.
        """
        pixels = self._cache.get(record)
        if pixels is None:
            pixels = decode(self._source[record])
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[record] = pixels
        return pixels

    def __getstate__(self):
        room = self._room + sum(pixels.nbytes for pixels in self._cache.values())
        return {"_source": self._source, "_room": room, "_cache": {}}


@functools.lru_cache(maxsize=4)
def _shared(name: str, data_dir: str, cache_bytes: int) -> tuple[Dataset, Pictures]:
    # Phases and splits of a run decode each picture once.
    dataset = open_dataset(name, data_dir)
    return dataset, Pictures(dataset, cache_bytes)


class Concepts:
    """A unit is a concept with all its drawings in the split.

    So a batch rarely holds two pictures with one name. In the language stage a unit is a concept
    without a picture; its validation reads the texts of unseen concepts.
    """

    def __init__(
        self, dataset: Dataset, pictures: Pictures, stage: str, split: str, config: DataConfig
    ):
        """Draws from a prepared set; `open` is the usual way here.

        Args:
            dataset: the set.
            pictures: of it, decoded.
            stage: one of `internvl_jax.batch.STAGES`.
            split: "train" or "validation".
            config: the data settings.

        Raises:
            ValueError: if the split is empty or a kind of text is unknown.
        """
        self._dataset, self._pictures, self._config = dataset, pictures, config
        concepts = self._concepts = dataset.concepts
        self._pool = training_pool(concepts)
        if stage == "language":
            for kind in config.texts:
                if kind not in TEXTS:
                    raise ValueError(f"data.texts has {kind!r}; choose from {', '.join(TEXTS)}.")
            wanted = split == "validation"
            units = [np.asarray([i]) for i, c in enumerate(concepts) if c.unseen == wanted]
            shown = np.arange(len(concepts))
        else:
            units, shown = group_by_concept(dataset, split), dataset.concept
        self._units = [
            unit for unit in units if concepts[shown[unit[0]]].group not in config.skip_groups
        ]
        if not self._units:
            raise ValueError(
                f"The split {split!r} of {dataset.name!r} is empty; look at data.skip_groups."
            )
        self._shown, self._stage = shown, stage
        self.ends = np.asarray([len(self._units)])
        self.records, self.digest = len(shown), f"{dataset.name}/{split}/{len(shown)}"

    @classmethod
    def open(cls, name: str, stage: str, split: str, config: DataConfig) -> Concepts:
        """Opens a prepared set; phases and splits of a run share its decoded pictures.

        Args:
            name: "emoji", "shapes", or a folder.
            stage: one of `internvl_jax.batch.STAGES`.
            split: "train" or "validation".
            config: the data settings.

        Returns:
            The set.

        Raises:
            FileNotFoundError: if it has not been built.
            ValueError: if the split is empty or a kind of text is unknown.
        """
        dataset, pictures = _shared(name, config.data_dir, config.cache_bytes)
        return cls(dataset, pictures, stage, split, config)

    def __len__(self) -> int:
        return len(self._units)

    def draw(self, unit: int, rng: np.random.Generator) -> tuple[int, Sequence[Sample]]:
        """One drawing of a concept, with texts for the stage.

        Args:
            unit: which concept.
            rng: source of randomness.

        Returns:
            The record's number (in the language stage the concept's), and the sample.

        Raises:
            BadImageError: if the drawing cannot be decoded.
        """
        records = self._units[unit]
        record = int(records[rng.integers(len(records))])
        number = int(self._shown[record])
        if self._stage == "language":
            return record, (self._text(number, rng),)
        image, key = self._pictures[record], self._concepts[number].key
        if self._stage == "contrastive":
            sample = Sample(key, (image,), captions=self._names(number), group=number)
        elif self._stage == "generative":
            own, other = self._captions(number, rng)
            sample = Sample(key, (image,), captions=(own,), negative=other, group=number)
        else:
            sample = Sample(key, (image,), turns=self._turns(number, rng), group=number)
        return record, (sample,)

    def close(self) -> None:
        """Nothing: all sets of a run share its pictures."""

    def _names(self, number: int) -> tuple[Caption, ...]:
        concept = self._concepts[number]
        named = [code for code in self._config.languages if code in concept.names]
        # With a name in none of them, choosing one says so.
        named = named or [choose_language(np.random.default_rng(), concept, self._config.languages)]
        return tuple(Caption(concept.names[code], code) for code in named)

    def _captions(self, number: int, rng: np.random.Generator) -> tuple[Caption, Caption]:
        """The name or some keywords, and another concept's caption of the same kind and language.

        The negative is drawn again while it fits the picture too.
        """
        concept = self._concepts[number]
        language = choose_language(rng, concept, self._config.languages)
        keywords = rng.random() < self._config.keyword_share
        own = negative = _caption(concept, language, keywords, rng)
        while fits(negative, concept, language):
            other = other_concept(rng, number, self._concepts, self._pool, language)
            negative = _caption(other, language, keywords, rng)
        return Caption(own, language), Caption(negative, language)

    def _turns(self, number: int, rng: np.random.Generator) -> tuple[Turn, ...]:
        """A generated conversation; without roles the picture and its name."""
        config, concept = self._config, self._concepts[number]
        if not TEMPLATES[config.template].roles:
            name = concept.names[choose_language(rng, concept, config.languages)]
            return Turn("human", IMAGE_PLACEHOLDER), Turn("gpt", name)
        questions = converse(number, self._concepts, self._pool, config, rng)
        record = conversation(concept.key, concept.key, questions)
        return tuple(Turn(turn["from"], turn["value"]) for turn in record["conversations"])

    def _text(self, number: int, rng: np.random.Generator) -> Sample:
        """A text of one of the kinds `TEXTS`.

        The name; some keywords; a caption after its prompt; "summarize:" and the name; the name in
        two languages ("cat in Italian: gatto"); a conversation of stage 3 with a caption in place
        of its picture, as the texts that LLaVA's instructions were written from.
        """
        languages, concept = self._config.languages, self._concepts[number]
        kind = choose(rng, self._config.texts)
        if kind == "dialogue":
            questions = converse(number, self._concepts, self._pool, self._config, rng)
            picture = self._either(number, choose_language(rng, concept, languages), rng)
            turns = tuple(
                Turn(turn["from"], turn["value"].replace(IMAGE_PLACEHOLDER, picture))
                for turn in conversation("", "", questions)["conversations"]
            )
            return Sample(concept.key, turns=turns)
        language = choose_language(rng, concept, languages)
        text, prompt = concept.names[language], ""
        if kind == "keywords":
            text = keyword_caption(rng, concept, language)
        elif kind == "caption":
            text, prompt = self._either(number, language, rng), caption_prompt(language)
        elif kind == "summarize":
            text = SUMMARIZE + text
        elif kind == "translation":
            target = choose_language(rng, concept, languages)
            text = f"{text} in {LANGUAGES[target]}: {concept.names[target]}"
        return Sample(concept.key, captions=(Caption(text, language, prompt),))

    def _either(self, number: int, language: str, rng: np.random.Generator) -> str:
        return _caption(self._concepts[number], language, rng.random() >= 0.5, rng)


def _caption(concept: Concept, language: str, keywords: bool, rng: np.random.Generator) -> str:
    return keyword_caption(rng, concept, language) if keywords else concept.names[language]


def group_by_concept(dataset: Dataset, split: str) -> list[np.ndarray]:
    """The records of a split, those of one concept together.

    Args:
        dataset: the set.
        split: its split.

    Returns:
        Record numbers of each concept, in the order of concepts.
    """
    records = dataset.splits[split]
    order = np.argsort(dataset.concept[records], kind="stable")
    concepts = dataset.concept[records][order]
    return np.split(records[order], np.flatnonzero(np.diff(concepts)) + 1) if len(records) else []
