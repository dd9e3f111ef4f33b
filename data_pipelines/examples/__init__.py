"""One example of a stage from one concept and its picture.

A builder is called with the picture (already cropped and resized, or None where the stage has no
pictures), the number of its concept and a random generator of its own, and returns the example's
arrays, without the batch axis. It draws the language, the caption, the other concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Concept
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, pad_rows

Builder = Callable[[np.ndarray | None, int, np.random.Generator], dict[str, np.ndarray]]


def make_builder(
    stage: str, config: DataConfig, tokenizer: Tokenizer, concepts: Sequence[Concept]
) -> Builder:
    """The builder of a stage.

    Args:
        stage: "language", "contrastive", "generative" or "finetune".
        config: the data settings.
        tokenizer: of the model that is trained.
        concepts: the table that concept numbers point into.

    Returns:
        The builder.

    Raises:
        ValueError: if the stage is unknown or its texts do not fit the settings.
    """
    if stage == "language":
        from data_pipelines.examples.language import LanguageBuilder

        return LanguageBuilder(config, tokenizer, concepts)
    if stage == "contrastive":
        from data_pipelines.examples.contrastive import ContrastiveBuilder

        return ContrastiveBuilder(config, tokenizer, concepts)
    if stage == "generative":
        from data_pipelines.examples.generative import GenerativeBuilder

        return GenerativeBuilder(config, tokenizer, concepts)
    if stage == "finetune":
        from data_pipelines.examples.finetune import FinetuneBuilder

        return FinetuneBuilder(config, tokenizer, concepts)
    raise ValueError(
        f"Stage {stage!r} is unknown; choose language, contrastive, generative or finetune."
    )


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
