"""Matching accuracy: counted per class, ties are wrong, pairs are balanced."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.evaluation import gallery
from internvl_jax.evaluate.evaluators.matching import Matching


@pytest.fixture(scope="module")
def matching(tokenizer):
    shapes = gallery(
        {"dataset": "shapes", "image_size": 16}, which="judged", languages=("en", "ar")
    )
    return Matching(shapes, tokenizer, text_length=24, name="turned", limit=12, batch_size=8)


def test_a_random_model_is_finite_and_deterministic(matching, model):
    logits = matching.logits(model)
    assert logits.shape == (12, 2, 2, 2) and np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, matching.logits(model))
    # The text is read: a right and a wrong name do not score alike.
    assert np.abs(logits[:, :, 0] - logits[:, :, 1]).max() > 1e-6
    figures = matching.run(model)
    assert figures["turned.en.itm_n"] == 24 and figures["turned.ar.itm_chance"] == 0.5
    assert 0 <= figures["turned.en.itm_accuracy"] <= 1


def test_accuracy_is_counted(matching):
    logits = np.zeros((12, 2, 2, 2), np.float32)
    logits[:9, 0, 0, 1] = 1  # English: 9 of 12 right names are called a match
    logits[:6, 0, 1, 0] = 1  # and 6 of 12 wrong ones are not
    logits[:3, 0, 1, 0] = -1
    figures = matching.score(logits)
    assert figures["turned.en.itm_match"] == 0.75
    assert figures["turned.en.itm_other"] == 0.25
    assert figures["turned.en.itm_accuracy"] == 0.5
    # Arabic: equal logits everywhere are no answer.
    assert figures["turned.ar.itm_accuracy"] == 0


def test_always_yes_is_chance(matching):
    logits = np.zeros((12, 2, 2, 2), np.float32)
    logits[..., 1] = 5
    figures = matching.score(logits)
    assert figures["turned.en.itm_accuracy"] == figures["turned.en.itm_chance"] == 0.5
