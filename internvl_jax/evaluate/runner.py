"""The evaluations of each stage's model, and the examples that the report shows.

Every function takes the data settings, builds the galleries of held-out pictures at the model's
image size, runs the evaluators and returns flat figures (``fluent.en.i2t_R@10``; whoever keeps
several stages' figures puts the stage in front) and the examples, as values that JSON can hold:
texts, numbers, and pictures as base64 of their PNG.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.config import DataConfig, as_data_config
from data_pipelines.datasets import Dataset, open_dataset
from data_pipelines.evaluation import Gallery, gallery
from data_pipelines.text import Tokenizer
from internvl_jax.evaluate.evaluators.captions import Captions
from internvl_jax.evaluate.evaluators.dialogue import Dialogue
from internvl_jax.evaluate.evaluators.matching import Matching
from internvl_jax.evaluate.evaluators.name_retrieval import NameRetrieval
from internvl_jax.evaluate.evaluators.selection import list_name
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.internvl_chat import InternVLChat

Figures = dict[str, float]
Examples = dict[str, Any]


def evaluate_contrastive(
    model: InternVL,
    tokenizer: Tokenizer,
    data: DataConfig | Mapping[str, Any],
    *,
    mode: str,
    image_size: int,
    text_length: int,
    languages: Sequence[str],
    split: str = "held_out",
    lists: Sequence[str] = ("judged", "unseen", "all"),
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[Figures, Examples]:
    """Name retrieval: the fixed list, the unseen concepts, and all of them.

    Args:
        model: InternVL-C or -G.
        tokenizer: of the model.
        data: settings of the data set; its dataset, data_dir and resize are used.
        mode: "C" or "G".
        image_size: S in pixels.
        text_length: T.
        languages: of the names.
        split: "held_out" to judge, "validation" to tune.
        lists: which concepts compete (`evaluators.name_retrieval.NameRetrieval`).
        batch_size: rows per call of the model.
        limit: at most so many pictures of each list, evenly spread; None for all.

    Returns:
        Figures, and ``{pictures, names}`` for the report.
    """
    config = _config(data, image_size, languages)
    every = gallery(config, split=split, which="all")
    dataset = open_dataset(config.dataset, config.data_dir)
    evaluator = NameRetrieval(
        gallery=every,
        tokenizer=tokenizer,
        mode=mode,
        text_length=text_length,
        name=vendor(dataset, split),
        lists=tuple(lists),
        limit=limit,
        batch_size=batch_size,
    )
    embeddings = evaluator.embed(model)
    examples = evaluator.examples(embeddings, which=lists[0])
    return evaluator.score(embeddings), _with_pictures(examples, dataset)


def evaluate_generative(
    model: InternVL,
    tokenizer: Tokenizer,
    data: DataConfig | Mapping[str, Any],
    *,
    image_size: int,
    text_length: int,
    languages: Sequence[str],
    split: str = "held_out",
    lists: Sequence[str] = ("judged", "unseen", "all"),
    beams: int = 1,
    batch_size: int = 64,
    limit: int | None = None,
    caption_limit: int | None = None,
) -> tuple[Figures, Examples]:
    """Retrieval with InternVL-G, matching and captions.

    Args:
        model: with queries.
        tokenizer: of the model.
        data: settings of the data set.
        image_size: S in pixels.
        text_length: T.
        languages: of names and captions.
        split: "held_out" or "validation".
        lists: which concepts compete; matching and captions judge the first one, and the unseen
            concepts where they are listed.
        beams: width of the captions' beam search; 1 is greedy.
        batch_size: rows per call of the model.
        limit: at most so many pictures of each list for retrieval and matching.
        caption_limit: the same for captions; None is `limit`.

    Returns:
        Figures, and ``{pictures, names, captions}`` for the report.
    """
    figures, examples = evaluate_contrastive(
        model,
        tokenizer,
        data,
        mode="G",
        image_size=image_size,
        text_length=text_length,
        languages=languages,
        split=split,
        lists=lists,
        batch_size=batch_size,
        limit=limit,
    )
    config = _config(data, image_size, languages)
    dataset = open_dataset(config.dataset, config.data_dir)
    for which, pictures in _galleries(config, split, lists):
        name = list_name(vendor(dataset, split), which)
        matching = Matching(pictures, tokenizer, text_length, name, limit, batch_size)
        figures |= matching.run(model)
        captions = Captions(
            pictures,
            tokenizer,
            name,
            beams=beams,
            limit=limit if caption_limit is None else caption_limit,
            batch_size=batch_size,
        )
        texts = captions.captions(model)
        figures |= captions.score(texts)
        if which == lists[0]:
            examples["captions"] = _with_pictures(captions.examples(texts), dataset)
    return figures, examples


def evaluate_chat(
    model: InternVLChat,
    tokenizer: Tokenizer,
    data: DataConfig | Mapping[str, Any],
    *,
    image_size: int,
    languages: Sequence[str],
    split: str = "held_out",
    lists: Sequence[str] = ("judged", "unseen"),
    template: str = "vicuna_v1",
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[Figures, Examples]:
    """Closed questions answered by generation, and a few conversations.

    Args:
        model: the chat model.
        tokenizer: of its language model.
        data: settings of the data set.
        image_size: S in pixels.
        languages: of the names in the questions.
        split: "held_out" or "validation".
        lists: which concepts are asked about.
        template: of the conversations.
        batch_size: questions per call of the model.
        limit: at most so many pictures of each list.

    Returns:
        Figures, and ``{dialogues}`` for the report.
    """
    config = _config(data, image_size, languages)
    dataset = open_dataset(config.dataset, config.data_dir)
    figures: Figures = {}
    examples: Examples = {}
    for which, pictures in _galleries(config, split, lists):
        evaluator = Dialogue(
            gallery=pictures,
            tokenizer=tokenizer,
            template=template,
            name=list_name(vendor(dataset, split), which),
            limit=limit,
            batch_size=batch_size,
        )
        figures |= evaluator.run(model)
        if which == lists[0]:
            examples["dialogues"] = _with_pictures(evaluator.examples(model), dataset)
    return figures, examples


def vendor(dataset: Dataset, split: str) -> str:
    """What the figures of a split are called: its vendor, or the split where there are several."""
    names = {dataset.vendor[int(record)] for record in dataset.splits[split]}
    return names.pop() if len(names) == 1 else split


def _config(
    data: DataConfig | Mapping[str, Any], image_size: int, languages: Sequence[str]
) -> DataConfig:
    return dataclasses.replace(
        as_data_config(data), image_size=image_size, languages=tuple(languages)
    )


def _galleries(config: DataConfig, split: str, lists: Sequence[str]) -> list[tuple[str, Gallery]]:
    """The first list and the unseen concepts, where there are pictures of them."""
    wanted = [which for i, which in enumerate(lists) if i == 0 or which == "unseen"]
    found = [(which, gallery(config, split=split, which=which)) for which in wanted]
    return [(which, pictures) for which, pictures in found if len(pictures.images)]


def _with_pictures(value: Any, dataset: Dataset) -> Any:
    """Puts the picture beside every record number, wherever it stands."""
    if isinstance(value, list):
        return [_with_pictures(item, dataset) for item in value]
    if isinstance(value, dict):
        out = {key: _with_pictures(item, dataset) for key, item in value.items()}
        if "record" in out:
            out["image"] = base64.b64encode(dataset.pictures[out["record"]]).decode("ascii")
        return out
    return value
