"""Stage 3: conversations about pictures, answers learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sample import BadRecordError, Sample, Turn
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, IMAGE_PLACEHOLDER, TEMPLATES, tokenize


class FinetuneBuilder:
    """Arrays image [M,S,S,3] (further slots zero); text, segment, labels [T].

    A conversation that is too long for its row loses its last rounds, one round alone is cut.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.template = TEMPLATES[config.template]
        opening = self.rows((Turn("human", IMAGE_PLACEHOLDER),))[0]
        if len(opening) + 2 > config.text_length:
            raise ValueError(
                f"data.text_length {config.text_length} leaves no room for an answer: the "
                f"{config.visual_tokens} visual tokens and the words around them take "
                f"{len(opening)}; raise it."
            )

    def __call__(
        self, samples: Sequence[Sample], images: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        config, S = self.config, self.config.canvas or self.config.image_size
        if len(images) > config.image_slots:
            raise BadRecordError(
                "too many images",
                f"{samples[0].key} has {len(images)} pictures, more than the {config.image_slots} "
                "of stage.image_slots.",
            )
        slots = np.zeros((config.image_slots, S, S, 3), np.uint8)
        for slot, image in zip(slots, images):
            slot[:] = image
        text = np.full(config.text_length, self.tokenizer.pad_id, np.int32)
        segment, labels = np.zeros_like(text), np.full_like(text, IGNORE)
        start = 0
        for number, sample in enumerate(samples, 1):
            ids, learned = self.fitting(sample, config.text_length - start)
            end = start + len(ids)
            text[start:end], labels[start:end], segment[start:end] = ids, learned, number
            start = end
        return {"image": slots, "text": text, "segment": segment, "labels": labels}

    def fitting(self, sample: Sample, room: int) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's ids and labels, without the last rounds where they are too many.

        Args:
            sample: with turns.
            room: most tokens.

        Returns:
            ids and labels [n], n <= room.

        Raises:
            BadRecordError: if it has no turns, not as many "<image>" as pictures, or turns that
                do not alternate.
        """
        turns = sample.turns
        if len(turns) < 2:
            raise BadRecordError("conversation", f"{sample.key} has no question and answer.")
        asked = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
        if asked != len(sample.images):
            raise BadRecordError(
                "image count",
                f"{sample.key} has {len(sample.images)} pictures but {asked} times "
                f"{IMAGE_PLACEHOLDER}.",
            )
        ids, labels = self.rows(turns)
        while len(ids) > room and len(turns) > 2:
            turns = turns[:-2]
            ids, labels = self.rows(turns)
        if (labels[:room] == IGNORE).all():
            raise BadRecordError(
                "too long", f"{sample.key} has no answer within {room} tokens: raise text_length."
            )
        return ids[:room], labels[:room]

    def rows(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a conversation of any length.

        Args:
            turns: at least one.

        Returns:
            ids and labels [n] int32.

        Raises:
            BadRecordError: if the turns do not alternate.
        """
        try:
            segments = self.template.segments(
                [{"from": turn.role, "value": turn.value} for turn in turns]
            )
        except ValueError as error:
            raise BadRecordError("conversation", str(error)) from error
        return tokenize(
            segments,
            self.tokenizer.ids,
            bos=self.tokenizer.bos_id,
            eos=self.tokenizer.eos_id,
            visual_tokens=self.config.visual_tokens,
        )
