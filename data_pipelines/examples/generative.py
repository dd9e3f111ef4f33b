"""Stage 2: a picture, its caption, and the caption of another."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.examples import pair, row
from data_pipelines.sample import Sample
from data_pipelines.text import Tokenizer
from internvl_jax.batch import LANGUAGES, SUMMARIZE, caption_labels, caption_prompt


class GenerativeBuilder:
    """The rows of the stage-2 loss (spec §3.1).

    A caption whose language is not known, or has no prompt, counts as of the first of
    ``data.languages``.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def __call__(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        image, caption = pair(samples, images, rng)
        negative = samples[0].negative
        assert negative is not None, "the set gives one in this stage"
        length, encode = self.config.text_length, self.tokenizer.encode
        language = caption.language
        prompt, size = self._prompt(language if language in LANGUAGES else self.config.languages[0])
        ids, mask = encode(caption.text, length, prompt=prompt)
        return {
            "image": image,
            **row("positive", *encode(caption.text, length)),
            **row("negative", *encode(negative.text, length)),
            **row("summarize", *encode(SUMMARIZE + caption.text, length)),
            **row("text", ids, mask),
            "labels": caption_labels(ids, mask, size),
            "image_id": np.asarray(samples[0].group, np.int32),
        }

    @functools.lru_cache(maxsize=len(LANGUAGES))  # noqa: B019  (a builder lives as long as its run)
    def _prompt(self, language: str) -> tuple[str, int]:
        prompt = caption_prompt(language)
        return prompt, 1 + len(self.tokenizer.ids(prompt))
