"""The data part of a training config."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from data_pipelines.image import RESIZES
from internvl_jax.batch import LANGUAGES, TEMPLATES

QUESTIONS = ("which", "is", "what", "language")
"""Kinds of generated questions, in the order in which a conversation asks them: what is to be seen
in the picture must not be read off an earlier answer."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a pipeline serves; plain values only.

    Attributes:
        dataset: "emoji", "shapes", or the folder of a prepared set.
        data_dir: where sets were built.
        tokenizer: path of a sentencepiece model; "" is the one trained with the set.
        vocab_size: rows of the text embedding, checked against the tokenizer; 0 takes any.
        image_size: side S of a picture in pixels.
        text_length: tokens per row T.
        languages: languages of captions, drawn evenly.
        prefix_share: share of the contrastive stage's captions that come after "summarize:". The
            rest stand alone, as in the matching rows of stage 2: a tower that did not read texts
            before stage 1 knows them only in the form they had there.
        keyword_share: share of the generative stage's captions that are keywords, not the name.
        skip_groups: groups of concepts left out of training, e.g. ("Flags",).
        visual_tokens: visual tokens V per image in the chat model.
        image_slots: images per conversation M.
        template: of conversations, "vicuna_v1" or "plain".
        max_questions: most questions in a generated conversation.
        questions: kinds of question to choose from (`QUESTIONS`); one that stands twice is asked
            more often.
        texts: kinds of text of the language stage, drawn evenly (`examples.language.KINDS`).
        crop_scale: least and greatest share of the area kept by the random crop; (1, 1) with
            crop_ratio (1, 1) keeps square pictures whole.
        crop_ratio: least and greatest width / height of the crop.
        flip: chance of a mirror image.
        resize: how pictures are resized where they are not cropped: "square" or "center".
        threads: that prepare batches ahead.
        prefetch: batches held ready.
        cache_bytes: memory for decoded pictures.
    """

    dataset: str = "emoji"
    data_dir: str = "data"
    tokenizer: str = ""
    vocab_size: int = 0
    image_size: int = 40
    text_length: int = 24
    languages: tuple[str, ...] = ("en", "zh", "ja", "ar", "it")
    prefix_share: float = 1.0
    keyword_share: float = 0.5
    skip_groups: tuple[str, ...] = ()
    visual_tokens: int = 1
    image_slots: int = 1
    template: str = "vicuna_v1"
    max_questions: int = 3
    questions: tuple[str, ...] = QUESTIONS
    texts: tuple[str, ...] = ("name", "keywords", "caption", "translation")
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    resize: str = "square"
    threads: int = 1
    prefetch: int = 4
    cache_bytes: int = 256 << 20

    def __post_init__(self):
        _require(bool(self.languages), "data.languages is empty; name at least one language.")
        for language in self.languages:
            _require(
                language in LANGUAGES,
                f"data.languages has {language!r}; choose from {', '.join(LANGUAGES)}.",
            )
        _require(bool(self.questions), "data.questions is empty; name at least one kind.")
        for kind in self.questions:
            _require(
                kind in QUESTIONS,
                f"data.questions has {kind!r}; choose from {', '.join(QUESTIONS)}.",
            )
        for field in ("image_size", "text_length", "image_slots", "threads", "max_questions"):
            _require(getattr(self, field) >= 1, f"data.{field} must be at least 1.")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "data.crop_scale must be two shares 0 < low <= high <= 1.")
        low, high = self.crop_ratio
        _require(0 < low <= high, "data.crop_ratio must be two ratios 0 < low <= high.")
        for field in ("flip", "prefix_share", "keyword_share"):
            _require(0 <= getattr(self, field) <= 1, f"data.{field} must be between 0 and 1.")
        _require(
            self.resize in RESIZES, f"data.resize must be one of {', '.join(sorted(RESIZES))}."
        )
        _require(
            self.template in TEMPLATES,
            f"data.template must be one of {', '.join(sorted(TEMPLATES))}.",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def as_data_config(values: Any) -> DataConfig:
    """Checks a mapping (or a dataclass) of settings.

    Args:
        values: a mapping or dataclass of names and plain values; what is left out keeps its
            default.

    Returns:
        The frozen config.

    Raises:
        ValueError: if a name is unknown or a value is out of its range.
    """
    if isinstance(values, DataConfig):
        return values
    settings: dict[str, Any] = (
        {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
        if dataclasses.is_dataclass(values)
        else {**values}
    )
    known = [field.name for field in dataclasses.fields(DataConfig)]
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(f"data.{name} is no setting; did you mean {' or '.join(near)}?")
    return DataConfig(**settings)
