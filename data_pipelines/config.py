"""The data part of a training config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.image import RESIZES, Resample
from internvl_jax.batch import LANGUAGES, TEMPLATES
from internvl_jax.config import build

QUESTIONS = ("which", "is", "what", "language")
"""Kinds of generated questions, in the order in which a conversation asks them: what is to be seen
in the picture must not be read off an earlier answer."""


ORDERS = ("global", "window")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a mixture.

    Attributes:
        path: "emoji", "shapes", or a folder that `data_pipelines.build` wrote (``gs://`` as well).
        weight: its share of the examples, relative to the other parts', or pairs
            ``((0, 1.0), (20000, 0.3))``: the first step, the weight from there on. Not given, its
            number of units: then every unit is seen equally often.
    """

    path: str
    weight: float | tuple[tuple[int, float], ...] | None = None

    def schedule(self, units: int) -> tuple[tuple[int, float], ...]:
        """The weight from step to step.

        Args:
            units: of the part.

        Returns:
            (first step, weight), the first one 0.
        """
        if self.weight is None:
            return ((0, float(units)),)
        return self.weight if isinstance(self.weight, tuple) else ((0, float(self.weight)),)

    def __post_init__(self):
        _require(bool(self.path), "A part of data.mixture has no path.")
        steps = [step for step, _ in self.schedule(1)]
        _require(
            steps[:1] == [0] and steps == sorted(set(steps)),
            f"The weights of {self.path} begin at steps {steps}; they must rise from 0.",
        )
        _require(
            all(weight >= 0 for _, weight in self.schedule(1)),
            f"A weight of {self.path} is negative.",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a pipeline serves; plain values only.

    Attributes:
        dataset: "emoji", "shapes", or the folder of a prepared set or corpus.
        mixture: several of them: name -> `Part`; not used where ``dataset`` names one. The name
            seeds a part's order, so that parts of one size do not walk in step, and a part added
            later leaves the others' order.
        order: "global" draws from all records alike; "window" reads shard after shard, as object
            stores like it (`shuffle.WindowOrder`).
        window: records that are shuffled with each other in a window.
        lanes: places of the global batch that walk the data side by side; in windows, a multiple
            of the number of hosts.
        pack: several conversations in a row of tokens (finetune, corpora of conversations).
        data_dir: where sets were built.
        tokenizer: path of a sentencepiece model; "" is the one trained with the set.
        vocab_size: rows of the text embedding, checked against the tokenizer; 0 takes any.
        image_size: side S of a picture in pixels.
        canvas: side C of canvases that the device crops pictures from; 0 crops them on the host.
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
            crop_ratio (1, 1) keeps square pictures whole, () resizes them without a crop.
        crop_ratio: least and greatest width / height of the crop.
        flip: chance of a mirror image.
        resize: how pictures are resized where they are not cropped: "square", "center" or "pad".
        resample: of training pictures: "fast", or "exact" as in evaluation (`image`).
        threads: that prepare batches ahead.
        prefetch: batches held ready; at least one for each thread.
        cache_bytes: memory for decoded pictures.
    """

    dataset: str = ""
    mixture: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    order: str = "global"
    window: int = 8192
    lanes: int = 1
    pack: bool = False
    data_dir: str = "data"
    tokenizer: str = ""
    vocab_size: int = 0
    image_size: int = 40
    canvas: int = 0
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
    crop_scale: tuple[float, ...] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    resize: str = "square"
    resample: Resample = "fast"
    threads: int = 1
    prefetch: int = 4
    cache_bytes: int = 256 << 20

    @property
    def parts(self) -> Mapping[str, Part]:
        """What is drawn from, by name."""
        return {"dataset": Part(self.dataset)} if self.dataset else self.mixture

    def __post_init__(self):
        _require(
            bool(self.dataset or self.mixture),
            "Neither data.dataset nor data.mixture names any data; give the folder of a corpus.",
        )
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
        positive = ("image_size", "text_length", "image_slots", "threads", "max_questions")
        for field in (*positive, "window", "lanes"):
            _require(getattr(self, field) >= 1, f"data.{field} must be at least 1.")
        _require(self.order in ORDERS, f"data.order must be one of {', '.join(ORDERS)}.")
        low, high = self.crop_scale or (1, 1)
        _require(0 < low <= high <= 1, "data.crop_scale must be two shares 0 < low <= high <= 1.")
        low, high = self.crop_ratio
        _require(0 < low <= high, "data.crop_ratio must be two ratios 0 < low <= high.")
        for field in ("flip", "prefix_share", "keyword_share"):
            _require(0 <= getattr(self, field) <= 1, f"data.{field} must be between 0 and 1.")
        _require(
            self.resize in RESIZES, f"data.resize must be one of {', '.join(sorted(RESIZES))}."
        )
        _require(
            not self.canvas or bool(self.crop_scale) or self.resize == "square",
            f"On a canvas pictures are resized whole, not as data.resize={self.resize}: set "
            "stage.canvas to 0.",
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
        ConfigError: if a name is unknown or a value is out of its range.
    """
    if isinstance(values, DataConfig):
        return values
    if dataclasses.is_dataclass(values):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return build(DataConfig, values, "config.data")
