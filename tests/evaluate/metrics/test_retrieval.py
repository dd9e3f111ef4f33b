"""Recall and chance against what one would do by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from internvl_jax.evaluate.metrics.retrieval import chance_recall, ranks, recall, top


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def brute_force_ranks(queries, targets, query_labels, target_labels):
    """Sorts every row by hand, right targets last among equals."""
    out = []
    for query, label in zip(queries, query_labels):
        scores = [float(query @ target) for target in targets]
        order = sorted(range(len(targets)), key=lambda j: (-scores[j], target_labels[j] == label))
        out.append(1 + next(p for p, j in enumerate(order) if target_labels[j] == label))
    return np.asarray(out)


@pytest.mark.parametrize("chunk", [1, 60, 10**6])
def test_ranks_equal_brute_force_with_several_right_targets_and_ties(rng, chunk):
    # Small integers: products are exact, and ties are frequent.
    queries = rng.integers(-2, 3, (40, 4)).astype(np.float32)
    targets = rng.integers(-2, 3, (30, 4)).astype(np.float32)
    target_labels = rng.integers(0, 12, 30)
    query_labels = rng.choice(target_labels, 40)
    found = ranks(queries, targets, query_labels, target_labels, chunk=chunk)
    expected = brute_force_ranks(queries, targets, query_labels, target_labels)
    # A right target tied with others of the same label and with wrong ones: best right, worst tie.
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 5


def test_equal_scores_hit_nothing():
    place = ranks(np.ones((3, 2)), np.ones((5, 2)), np.arange(3), np.arange(5))
    np.testing.assert_array_equal(place, 5)
    assert recall(place, 4) == 0 and recall(place, 5) == 1


def test_scores_that_are_no_numbers_hit_nothing():
    targets = np.eye(3)
    place = ranks(np.full((2, 3), np.nan), targets, np.arange(2), np.arange(3))
    np.testing.assert_array_equal(place, 3)
    broken = targets.copy()
    broken[2] = np.nan  # a wrong target without a score stands before the right one
    np.testing.assert_array_equal(ranks(targets[:1], broken, np.arange(1), np.arange(3)), 2)
    np.testing.assert_array_equal(ranks(targets[2:], broken, np.asarray([2]), np.arange(3)), 3)


def test_a_query_without_a_right_target_is_refused():
    with pytest.raises(ValueError, match=r"Query 1 \(label 7\) has no right target"):
        ranks(np.eye(2), np.eye(2), np.asarray([0, 7]), np.arange(2))


def test_the_diagonal_is_perfect_and_its_reverse_is_last():
    labels = np.arange(6)
    assert recall(ranks(np.eye(6), np.eye(6), labels, labels), 1) == 1
    np.testing.assert_array_equal(ranks(-np.eye(6), np.eye(6), labels, labels), 6)


def test_chance_equals_the_mean_over_all_orders():
    query_labels, target_labels = np.asarray([0, 1, 2]), np.asarray([0, 0, 1, 2, 2, 2])
    for k in (1, 2, 5, 6, 10):
        hits = [
            label in order[:k]
            for order in itertools.permutations(target_labels.tolist())
            for label in query_labels
        ]
        assert chance_recall(query_labels, target_labels, k) == pytest.approx(np.mean(hits))


def test_chance_without_repeats_is_k_of_m():
    labels = np.arange(943)
    assert chance_recall(labels, labels, 10) == pytest.approx(10 / 943)


def test_a_random_order_reaches_chance(rng):
    queries, targets = rng.normal(size=(4000, 8)), rng.normal(size=(50, 8))
    query_labels, target_labels = rng.integers(0, 20, 4000), np.arange(50) % 20
    found = recall(ranks(queries, targets, query_labels, target_labels), 5)
    assert found == pytest.approx(chance_recall(query_labels, target_labels, 5), abs=0.05)


@pytest.mark.parametrize("chunk", [1, 100])
def test_top_is_sorted_and_best(rng, chunk):
    queries, targets = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))
    indices, scores = top(queries, targets, 4, chunk=chunk)
    whole = queries @ targets.T
    np.testing.assert_array_equal(indices, np.argsort(-whole, axis=1)[:, :4])
    np.testing.assert_allclose(scores, -np.sort(-whole, axis=1)[:, :4])
    assert top(queries, targets, 20)[0].shape == (7, 9)
