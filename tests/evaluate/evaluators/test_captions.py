"""Captions: oracles by name and by keyword, and a random model end to end."""

from __future__ import annotations

import pytest

from data_pipelines.evaluation import gallery
from internvl_jax.evaluate.evaluators.captions import Captions
from internvl_jax.evaluate.evaluators.selection import thin


@pytest.fixture(scope="module")
def captions(tokenizer):
    shapes = gallery(
        {"dataset": "shapes", "image_size": 16}, which="judged", languages=("en", "it")
    )
    return Captions(shapes, tokenizer, "turned", max_new_tokens=6, limit=9, batch_size=5)


def truth(captions):
    shown = thin(captions.gallery, captions.limit)
    return [shown.concepts[i] for i in shown.target]


def test_names_are_exact(captions):
    names = {
        code: [concept.names[code].upper() + "." for concept in truth(captions)]
        for code in ("en", "it")
    }
    figures = captions.score(names)
    assert figures["turned.en.caption_exact"] == figures["turned.it.caption_keyword"] == 1
    assert figures["turned.en.chance_caption_exact"] == pytest.approx(1 / 9)
    assert figures["turned.en.caption_n"] == 9


def test_keywords_are_not_exact(captions):
    words = [f"nothing, {concept.keywords['en'][1]}" for concept in truth(captions)]
    figures = captions.score({"en": words})
    assert figures["turned.en.caption_exact"] == 0 and figures["turned.en.caption_keyword"] == 1
    # Every caption names the shape: shuffled, it still fits the other pictures of that shape.
    shapes = [concept.keywords["en"][1] for concept in truth(captions)]
    same = sum(a == b for a in shapes for b in shapes) / 81
    assert figures["turned.en.chance_caption_keyword"] == pytest.approx(same)
    assert figures["turned.en.constant_caption_keyword"] > same


def test_silence_scores_nothing(captions):
    figures = captions.score({"it": [""] * 9})
    assert figures["turned.it.caption_exact"] == figures["turned.it.caption_keyword"] == 0


def test_a_random_model_writes_something_for_every_picture(captions, model):
    texts = captions.captions(model)
    assert {code: len(rows) for code, rows in texts.items()} == {"en": 9, "it": 9}
    figures = captions.score(texts)
    assert all(0 <= value <= 9 for value in figures.values())
    examples = captions.examples(texts, count=3)
    assert [len(example["captions"]) for example in examples] == [2, 2, 2]
