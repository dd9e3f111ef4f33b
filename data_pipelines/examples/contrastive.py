"""Stage 1: a picture and its name in one language."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.examples import row
from data_pipelines.examples.captions import choose_language
from data_pipelines.text import Tokenizer
from internvl_jax.batch import SUMMARIZE


class ContrastiveBuilder:
    """Arrays image [S,S,3]; text, text_mask [T]: "summarize:" + name, BOS..EOS."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]):
        self.config, self.tokenizer, self.concepts = config, tokenizer, concepts

    def __call__(self, image, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        concept = self.concepts[number]
        language = choose_language(rng, concept, self.config.languages)
        prefix = SUMMARIZE if rng.random() < self.config.prefix_share else ""
        text = prefix + concept.names[language]
        ids, mask = self.tokenizer.encode(text, self.config.text_length)
        return {"image": image, **row("text", ids, mask)}
