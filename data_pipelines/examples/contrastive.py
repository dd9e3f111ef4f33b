"""Stage 1: a picture and a caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.examples import pair, row
from data_pipelines.sample import Sample
from data_pipelines.text import Tokenizer
from internvl_jax.batch import SUMMARIZE


class ContrastiveBuilder:
    """Arrays image [S,S,3]; text, text_mask [T]: "summarize:" + caption, BOS..EOS."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def __call__(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        image, caption = pair(samples, images, rng)
        prefix = SUMMARIZE if rng.random() < self.config.prefix_share else ""
        ids, mask = self.tokenizer.encode(prefix + caption.text, self.config.text_length)
        return {"image": image, **row("text", ids, mask)}
