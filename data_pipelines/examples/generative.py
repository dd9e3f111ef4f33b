"""Stage 2: a picture, its caption, and the caption of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.examples import row
from data_pipelines.examples.captions import (
    choose_language,
    fits,
    keyword_caption,
    other_concept,
    training_pool,
)
from data_pipelines.text import Tokenizer
from internvl_jax.batch import SUMMARIZE, caption_labels, caption_prompt


class GenerativeBuilder:
    """The rows of the stage-2 loss (spec §3.1).

    The caption is the name or some keywords; the negative is another concept's caption of the same
    kind in the same language, drawn again while it fits the picture too. image_id is the concept's
    number: drawings of one concept share their captions.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]):
        self.config, self.tokenizer, self.concepts = config, tokenizer, concepts
        self.pool = training_pool(concepts)
        self.prompts = {code: caption_prompt(code) for code in config.languages}
        self.prompt_length = {
            code: 1 + len(tokenizer.ids(prompt)) for code, prompt in self.prompts.items()
        }

    def __call__(self, image, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, encode = self.config.text_length, self.tokenizer.encode
        concept = self.concepts[number]
        language = choose_language(rng, concept, self.config.languages)
        keywords = rng.random() < self.config.keyword_share
        caption = self._caption(concept, language, keywords, rng)
        negative = caption
        while fits(negative, concept, language):
            other = other_concept(rng, number, self.concepts, self.pool, language)
            negative = self._caption(other, language, keywords, rng)
        ids, mask = encode(caption, length, prompt=self.prompts[language])
        return {
            "image": image,
            **row("positive", *encode(caption, length)),
            **row("negative", *encode(negative, length)),
            **row("summarize", *encode(SUMMARIZE + caption, length)),
            **row("text", ids, mask),
            "labels": caption_labels(ids, mask, self.prompt_length[language]),
            "image_id": np.asarray(number, np.int32),
        }

    def _caption(
        self, concept: Concept, language: str, keywords: bool, rng: np.random.Generator
    ) -> str:
        return keyword_caption(rng, concept, language) if keywords else concept.names[language]
