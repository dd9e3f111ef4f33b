"""Matching loss and hard negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.losses.matching import matching_loss, sample_hard_negatives


def test_cross_entropy_by_hand():
    logits = jnp.array([[0.0, 0.0], [1.0, 3.0], [2.0, -1.0]])
    labels = jnp.array([1, 1, 1], jnp.int32)
    loss, metrics = matching_loss(logits, labels)
    each = np.log([2.0, 1 + np.exp(-2.0), 1 + np.exp(3.0)])
    assert loss == pytest.approx(each.mean(), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    weights = jnp.array([0.25, 0.75, 0.0])
    loss, metrics = matching_loss(logits, labels, weights=weights)
    assert loss == pytest.approx((0.25 * each[0] + 0.75 * each[1]), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(0.75)


def test_ignored_rows_leave_no_trace():
    """A row of weight 0 may even be infinite; with no row left, loss and gradient are 0."""
    logits = jnp.array([[jnp.inf, 0.0], [1.0, 3.0]])
    labels = jnp.array([1, 0], jnp.int32)
    run = lambda x, w: matching_loss(x, labels, weights=w)[0]
    assert run(logits, jnp.array([0.0, 1.0])) == pytest.approx(np.log1p(np.exp(2.0)), rel=1e-6)
    value, grad = jax.value_and_grad(run)(logits[1:].repeat(2, 0), jnp.zeros(2))
    assert value == 0 and not np.any(grad)


def test_negatives_show_something_else():
    ids = jnp.array([0, 0, 1, 2, 2, 2], jnp.int32)
    similarity = 10.0 * (ids[:, None] == ids)  # the forbidden ones are the most similar
    draw = jax.jit(jax.vmap(lambda key: sample_hard_negatives(similarity, ids, key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert not np.any(np.asarray(ids)[drawn] == np.asarray(ids))
    # Each of the allowed ones comes up.
    assert all(len(set(column)) == (np.asarray(ids) != i).sum() for column, i in zip(drawn.T, ids))


def test_negatives_follow_the_similarity():
    similarity = jnp.log(jnp.array([[1.0, 0.1, 0.3, 0.6]]))
    draw = jax.vmap(
        lambda key: sample_hard_negatives(
            similarity,
            jnp.array([7], jnp.int32),
            key,
            column_ids=jnp.array([7, 1, 2, 3], jnp.int32),
        )
    )
    drawn = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))[:, 0]
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, [0, 0.1, 0.3, 0.6], atol=0.03)


def test_no_negative_is_said():
    ids = jnp.array([3, 3], jnp.int32)
    assert np.all(sample_hard_negatives(jnp.zeros((2, 2)), ids, jax.random.key(0)) == -1)
