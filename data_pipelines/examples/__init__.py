"""One example of a stage from a sample: tokens, masks and labels.

A builder is called with what makes the example (one sample; in the finetune stage several where
rows are packed), their pictures (cropped and resized, in order) and a random generator, and returns
the example's arrays without the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sample import BadRecordError, Caption, Sample
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, pad_rows

Builder = Callable[
    [Sequence[Sample], Sequence[np.ndarray], np.random.Generator], dict[str, np.ndarray]
]


def make_builder(stage: str, config: DataConfig, tokenizer: Tokenizer) -> Builder:
    """The builder of a stage.

    Args:
        stage: "language", "contrastive", "generative" or "finetune".
        config: the data settings.
        tokenizer: of the model that is trained.

    Returns:
        The builder; it raises BadRecordError where a sample lacks what the stage needs.

    Raises:
        ValueError: if the stage is unknown or its texts do not fit the settings.
    """
    if stage == "language":
        from data_pipelines.examples.language import LanguageBuilder

        return LanguageBuilder(config, tokenizer)
    if stage == "contrastive":
        from data_pipelines.examples.contrastive import ContrastiveBuilder

        return ContrastiveBuilder(config, tokenizer)
    if stage == "generative":
        from data_pipelines.examples.generative import GenerativeBuilder

        return GenerativeBuilder(config, tokenizer)
    if stage == "finetune":
        from data_pipelines.examples.finetune import FinetuneBuilder

        return FinetuneBuilder(config, tokenizer)
    raise ValueError(
        f"Stage {stage!r} is unknown; choose language, contrastive, generative or finetune."
    )


def pair(samples: Sequence[Sample], images: Sequence[np.ndarray], rng: np.random.Generator):
    """The picture and one of the captions of a single sample.

    Args:
        samples: one.
        images: [S,S,3] uint8, its first one is taken.
        rng: source of randomness.

    Returns:
        The picture and the caption.

    Raises:
        BadRecordError: if either is missing.
    """
    (sample,) = samples
    if not images:
        raise BadRecordError("missing image", f"{sample.key} has no picture.")
    return images[0], one_caption(sample, rng)


def one_caption(sample: Sample, rng: np.random.Generator) -> Caption:
    """One of a sample's captions, evenly.

    Args:
        sample: the sample.
        rng: source of randomness.

    Returns:
        The caption.

    Raises:
        BadRecordError: if there is none.
    """
    if not sample.captions:
        raise BadRecordError("missing caption", f"{sample.key} has no caption.")
    return sample.captions[int(rng.integers(len(sample.captions)))]


def row(prefix: str, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The two arrays of a text row.

    Args:
        prefix: name of the row.
        ids: [T] int32.
        mask: [T] bool.

    Returns:
        ``{prefix: ids, prefix_mask: mask}``.
    """
    return {prefix: ids, f"{prefix}_mask": mask}


def learned_row(
    ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    length: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """The arrays of a text row that is learned.

    Args:
        ids: tokens.
        labels: as many, IGNORE where nothing is learned.
        length: T; longer rows are cut.
        pad_id: the id of a pad.

    Returns:
        ``{text, text_mask, labels}``, each [T].
    """
    text, mask = pad_rows([ids], length, pad_id)
    padded, _ = pad_rows([labels], length, IGNORE)
    return {**row("text", text[0], mask[0]), "labels": padded[0]}
