"""Permutations of any length."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from data_pipelines import shuffle
from data_pipelines.shuffle import permute


@pytest.mark.parametrize("length", [1, 2, 3, 36, 257, 1900])
def test_is_a_permutation(length):
    assert sorted(permute(i, length, 5, 0) for i in range(length)) == list(range(length))


@pytest.mark.parametrize("length", [65_536, 65_537])
def test_large_lengths_are_permutations_too(length, monkeypatch):
    """65,537 = 2**16 + 1 is where Grain's index_shuffle alone repeats an element."""
    monkeypatch.setattr(shuffle, "SMALL", 0)
    out = np.fromiter((permute(i, length, 3) for i in range(length)), np.int64, length)
    assert len(np.unique(out)) == length and out.min() == 0 and out.max() == length - 1


def test_works_beyond_32_bits():
    length = 4_980_000_000
    out = [permute(i, length, 1, 0) for i in range(500)]
    assert len(set(out)) == 500 and max(out) > 2**32 and max(out) < length


def test_keys_give_other_orders():
    orders = {
        tuple(permute(i, 36, seed, epoch) for i in range(36))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_first_place_is_even():
    counts = collections.Counter(permute(0, 4, seed) for seed in range(2000))
    assert all(400 < counts[i] < 600 for i in range(4))
