"""Stage 0: texts alone, for the language model that later stages start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.examples import learned_row, one_caption
from data_pipelines.sample import Sample
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, TEMPLATES, tokenize


class LanguageBuilder:
    """Arrays text, text_mask, labels [T]; every token but BOS is a label, of dialogues the answers.

    A caption with its prompt is a text, and a conversation, whose pictures are left out.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def __call__(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        (sample,), length = samples, self.config.text_length
        if sample.turns:
            turns = [{"from": turn.role, "value": turn.value} for turn in sample.turns]
            ids, labels = tokenize(
                TEMPLATES["vicuna_v1"].segments(turns),
                self.tokenizer.ids,
                bos=self.tokenizer.bos_id,
                eos=self.tokenizer.eos_id,
                visual_tokens=0,
            )
        else:
            caption = one_caption(sample, rng)
            ids = self.tokenizer.row(caption.text, length, prompt=caption.prompt)
            labels = [IGNORE, *ids[1:]]
        return learned_row(ids, labels, length, self.tokenizer.pad_id)
