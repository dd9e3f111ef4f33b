"""Stage 0: texts alone, for the language model that later stages start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.examples import row
from data_pipelines.examples.captions import (
    choose,
    choose_language,
    keyword_caption,
    training_pool,
)
from data_pipelines.examples.instructions import converse
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
    """Arrays text, text_mask, labels [T]; every token but BOS is a label.

    Kinds: the name; some keywords; a caption after its prompt; "summarize:" and the name; the name
    in two languages ("cat in Italian: gatto"); a conversation of stage 3 without its picture.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]):
        for kind in config.texts:
            if kind not in KINDS:
                raise ValueError(f"data.texts has {kind!r}; choose from {', '.join(KINDS)}.")
        self.config, self.tokenizer, self.concepts = config, tokenizer, concepts
        self.pool = training_pool(concepts)

    def __call__(self, image, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = self._ids(choose(rng, self.config.texts), number, rng)
        length = self.config.text_length
        text = np.full(length, self.tokenizer.pad_id, np.int32)
        text[: len(ids)] = ids[:length]
        mask = np.arange(length) < len(ids)
        labels = np.where(mask & (np.arange(length) > 0), text, IGNORE).astype(np.int32)
        return {**row("text", text, mask), "labels": labels}

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
            text = name if rng.random() < 0.5 else keyword_caption(rng, concept, language)
        elif kind == "summarize":
            text = SUMMARIZE + name
        elif kind == "translation":
            target = choose_language(rng, concept, languages)
            text = f"{name} in {LANGUAGES[target]}: {concept.names[target]}"
        else:
            return self._dialogue(number, rng)
        return self.tokenizer.row(text, self.config.text_length, prompt=prompt)

    def _dialogue(self, number: int, rng: np.random.Generator) -> Sequence[int]:
        questions = converse(
            number, self.concepts, self.pool, self.config.languages, rng, self.config.max_questions
        )
        turns = []
        for question in questions:
            turns += [
                {"from": "human", "value": question.text.replace(IMAGE_PLACEHOLDER, "")},
                {"from": "gpt", "value": question.answer},
            ]
        segments = TEMPLATES["vicuna_v1"].segments(turns)
        tokenizer = self.tokenizer
        return tokenize(
            segments,
            tokenizer.ids,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            visual_tokens=0,
        )[0].tolist()
