"""Name retrieval on the shapes: an oracle is perfect, a random model is near chance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipelines.evaluation import gallery
from internvl_jax.evaluate.embed import embed_images, in_batches
from internvl_jax.evaluate.evaluators.name_retrieval import Embeddings, NameRetrieval
from internvl_jax.evaluate.evaluators.selection import spread

LANGUAGES = ("en", "zh", "ja", "ar", "it")


@pytest.fixture(scope="module")
def shapes():
    return gallery({"dataset": "shapes", "image_size": 16}, which="all", languages=LANGUAGES)


@pytest.fixture(scope="module")
def evaluator(shapes, tokenizer):
    return NameRetrieval(shapes, tokenizer, "C", text_length=24, name="turned", batch_size=10)


def oracle(shapes):
    """Every picture and every name is its concept's own unit vector."""
    names = np.eye(len(shapes.concepts), dtype=np.float32)
    return Embeddings(names[shapes.target], dict.fromkeys(shapes.names, names))


def test_an_oracle_is_perfect(evaluator, shapes):
    figures = evaluator.score(oracle(shapes))
    hits = {k: v for k, v in figures.items() if "i2t_R@" in k or "t2i_R@" in k}
    hits = {k: v for k, v in hits.items() if "chance" not in k and "ratio" not in k}
    assert len(hits) == 3 * 5 * 6 and set(hits.values()) == {1.0}
    assert figures["turned.en.n"] == figures["turned.en.names"] == 32
    assert figures["turned_unseen.it.n"] == 4 and figures["turned_all.zh.n"] == 36
    assert figures["turned.en.chance_R@10"] == pytest.approx(10 / 32)
    assert figures["turned.en.ratio_R@10"] == pytest.approx(3.2)


def test_a_constant_model_hits_nothing(evaluator, shapes):
    one = np.ones((len(shapes.concepts), 4), np.float32)
    figures = evaluator.score(Embeddings(one[shapes.target], dict.fromkeys(shapes.names, one)))
    assert figures["turned.en.i2t_R@10"] == figures["turned.ja.t2i_R@10"] == 0


def test_equal_names_are_one_candidate_and_right_for_both(evaluator, shapes):
    english = list(shapes.names["en"])
    english[1] = english[0]  # both on the judged list
    twins = dataclasses.replace(shapes, names={"en": tuple(english)})
    evaluator = dataclasses.replace(evaluator, gallery=twins, lists=("judged",))
    vectors = np.eye(len(shapes.concepts), dtype=np.float32)
    images = vectors[shapes.target].copy()
    images[shapes.target == 1] = vectors[0]
    figures = evaluator.score(Embeddings(images, {"en": vectors}))
    assert figures["turned.en.n"] == 32 and figures["turned.en.names"] == 31
    assert figures["turned.en.i2t_R@1"] == figures["turned.en.t2i_R@1"] == 1
    assert figures["turned.en.chance_R@1"] == pytest.approx(1 / 31)
    # One of the 31 names has two right pictures among 32.
    assert figures["turned.en.chance_t2i_R@1"] == pytest.approx((30 / 32 + 2 / 32) / 31)


def test_a_limit_thins_pictures_and_leaves_all_names(evaluator, shapes):
    limited = dataclasses.replace(evaluator, limit=8)
    figures = limited.score(oracle(shapes))
    assert figures["turned.en.n"] == 8 and figures["turned.en.names"] == 32
    assert figures["turned.en.chance_R@10"] == pytest.approx(10 / 32)
    assert figures["turned.en.t2i_R@1"] == 1


@pytest.mark.parametrize("mode", ["C", "G"])
def test_a_random_model_is_finite_and_near_chance(evaluator, model, mode):
    figures = dataclasses.replace(evaluator, mode=mode).run(model)
    assert all(np.isfinite(value) for value in figures.values())
    for language in LANGUAGES:
        # 32 pictures, chance 0.16: three standard deviations are 0.19.
        assert figures[f"turned.{language}.i2t_R@5"] < 0.16 + 0.19
        assert 0 < figures[f"turned.{language}.chance_R@5"] < 0.17


def test_batches_change_nothing(model, shapes):
    one = embed_images(model, shapes.images, "G", batch_size=36)
    many = embed_images(model, shapes.images, "G", batch_size=10)
    np.testing.assert_allclose(one, many, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    assert np.ptp(one, axis=0).max() > 1e-3  # pictures differ


def test_in_batches_keeps_rows_and_their_order():
    seen = []

    def function(a, b):
        seen.append(len(a))
        return a + b

    rows = np.arange(11)
    np.testing.assert_array_equal(in_batches(function, (rows, rows), 4), 2 * rows)
    assert seen == [4, 4, 4]


def test_examples_mark_what_is_right(evaluator, shapes):
    examples = evaluator.examples(oracle(shapes), count=4, best=2)
    assert len(examples["pictures"]) == 4
    row = examples["pictures"][0]
    assert [entry["language"] for entry in row["languages"]] == list(LANGUAGES)
    assert all(entry["rank"] == 1 and entry["names"][0]["right"] for entry in row["languages"])
    assert not any(entry["names"][1]["right"] for entry in row["languages"])
    assert row["name"] == row["languages"][0]["right"] == row["languages"][0]["names"][0]["text"]
    assert all(query["pictures"][0]["right"] for query in examples["names"])


def test_spread():
    assert spread(np.arange(10), 3).tolist() == [0, 3, 6]
    assert spread(np.arange(3), None).tolist() == spread(np.arange(3), 5).tolist() == [0, 1, 2]
