"""Stage 0: texts alone, for the language model that later stages start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.examples import learned_row
from data_pipelines.examples.captions import (
    choose,
    choose_language,
    keyword_caption,
    training_pool,
)
from data_pipelines.examples.instructions import conversation, converse
from data_pipelines.text import Tokenizer
from internvl_jax.batch import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    LANGUAGES,
    SUMMARIZE,
    TEMPLATES,
    caption_prompt,
    tokenize,
)

KINDS = ("name", "keywords", "caption", "summarize", "translation", "dialogue")


class LanguageBuilder:
    """Arrays text, text_mask, labels [T]; every token but BOS is a label, of dialogues the answers.

    Kinds: the name; some keywords; a caption after its prompt; "summarize:" and the name; the name
    in two languages ("cat in Italian: gatto"); a conversation of stage 3 with a caption in place of
    its picture, as the texts that LLaVA's instructions were written from.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]):
        for kind in config.texts:
            if kind not in KINDS:
                raise ValueError(f"data.texts has {kind!r}; choose from {', '.join(KINDS)}.")
        self.config, self.tokenizer, self.concepts = config, tokenizer, concepts
        self.pool = training_pool(concepts)

    def __call__(self, image, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        kind = choose(rng, self.config.texts)
        if kind == "dialogue":
            ids, labels = self._dialogue(number, rng)
        else:
            ids = self._ids(kind, number, rng)
            labels = [IGNORE, *ids[1:]]
        return learned_row(ids, labels, self.config.text_length, self.tokenizer.pad_id)

    def _ids(self, kind: str, number: int, rng: np.random.Generator) -> Sequence[int]:
        concept, languages = self.concepts[number], self.config.languages
        language = choose_language(rng, concept, languages)
        name, prompt = concept.names[language], ""
        if kind == "name":
            text = name
        elif kind == "keywords":
            text = keyword_caption(rng, concept, language)
        elif kind == "caption":
            prompt = caption_prompt(language)
            text = self._caption(number, language, rng)
        elif kind == "summarize":
            text = SUMMARIZE + name
        else:
            target = choose_language(rng, concept, languages)
            text = f"{name} in {LANGUAGES[target]}: {concept.names[target]}"
        return self.tokenizer.row(text, self.config.text_length, prompt=prompt)

    def _caption(self, number: int, language: str, rng: np.random.Generator) -> str:
        concept = self.concepts[number]
        named = rng.random() < 0.5
        return concept.names[language] if named else keyword_caption(rng, concept, language)

    def _dialogue(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config, concept = self.config, self.concepts[number]
        questions = converse(number, self.concepts, self.pool, config, rng)
        picture = self._caption(number, choose_language(rng, concept, config.languages), rng)
        record = conversation("", "", questions)
        turns = [
            {**turn, "value": turn["value"].replace(IMAGE_PLACEHOLDER, picture)}
            for turn in record["conversations"]
        ]
        return tokenize(
            TEMPLATES["vicuna_v1"].segments(turns),
            self.tokenizer.ids,
            bos=self.tokenizer.bos_id,
            eos=self.tokenizer.eos_id,
            visual_tokens=0,
        )
