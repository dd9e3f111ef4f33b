"""Stage 3: a conversation about a picture, answers learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.examples import learned_row
from data_pipelines.examples.captions import choose_language, training_pool
from data_pipelines.examples.instructions import conversation, converse
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IMAGE_PLACEHOLDER, TEMPLATES, tokenize


class FinetuneBuilder:
    """Arrays image [M,S,S,3] (one picture, further slots zero); text, text_mask, labels [T].

    With the template "plain" the conversation is the picture and its name (projector training).
    A conversation that is too long loses its last rounds, one round alone is cut.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]):
        self.config, self.tokenizer, self.concepts = config, tokenizer, concepts
        self.template = TEMPLATES[config.template]
        self.pool = training_pool(concepts)
        opening = self._rows([{"from": "human", "value": IMAGE_PLACEHOLDER}])[0]
        if len(opening) + 2 > config.text_length:
            raise ValueError(
                f"data.text_length {config.text_length} leaves no room for an answer: the "
                f"{config.visual_tokens} visual tokens and the words around them take "
                f"{len(opening)}; raise it."
            )

    def __call__(self, image, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        turns = self.record(number, rng)["conversations"]
        while True:
            ids, labels = self._rows(turns)
            if len(ids) <= self.config.text_length or len(turns) <= 2:
                break
            turns = turns[:-2]
        slots = np.zeros((self.config.image_slots, *image.shape), np.uint8)
        slots[0] = image
        length, pad = self.config.text_length, self.tokenizer.pad_id
        return {"image": slots, **learned_row(ids, labels, length, pad)}

    def record(self, number: int, rng: np.random.Generator) -> dict:
        """The conversation in LLaVA's format.

        Args:
            number: the concept shown.
            rng: source of randomness.

        Returns:
            ``{id, image, conversations}``.
        """
        concept, languages = self.concepts[number], self.config.languages
        if not self.template.roles:
            name = concept.names[choose_language(rng, concept, languages)]
            turns = [
                {"from": "human", "value": IMAGE_PLACEHOLDER},
                {"from": "gpt", "value": name},
            ]
            return {"id": concept.key, "image": concept.key, "conversations": turns}
        questions = converse(number, self.concepts, self.pool, self.config, rng)
        return conversation(concept.key, concept.key, questions)

    def _rows(self, turns) -> tuple[np.ndarray, np.ndarray]:
        return tokenize(
            self.template.segments(turns),
            self.tokenizer.ids,
            bos=self.tokenizer.bos_id,
            eos=self.tokenizer.eos_id,
            visual_tokens=self.config.visual_tokens,
        )
