"""Shares are exact, orders meet every record once, and nothing depends on who asks."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from data_pipelines.mixture import BLOCK, Drawn, Mixture
from data_pipelines.shuffle import GlobalOrder, WindowOrder

CHANGING = (((0, 3.0), (100, 0.0), (1000, 1.0)), ((0, 1.0),), ((0, 0.0), (100, 0.5)))


def counted(mixture: Mixture, start: int, stop: int) -> collections.Counter:
    return collections.Counter(mixture[g][0] for g in range(start, stop))


def test_a_block_holds_exact_shares():
    mixture = Mixture((((0, 3.0),), ((0, 1.0),), ((0, 1e-9),)), seed=0, global_batch=64)
    for block in range(3):
        found = counted(mixture, block * BLOCK, (block + 1) * BLOCK)
        assert found == {0: 3 * BLOCK // 4, 1: BLOCK // 4 - 1, 2: 1} or found == {
            0: 3 * BLOCK // 4 - 1, 1: BLOCK // 4, 2: 1,
        }  # fmt: skip


@pytest.mark.parametrize("lanes", [1, 4])
def test_draws_of_a_part_are_numbered_without_gaps(lanes):
    """Through changes of the weights, in every lane: each draw 0, 1, 2, … once and in order."""
    mixture = Mixture(CHANGING, seed=7, global_batch=16, lanes=lanes)
    draws = collections.defaultdict(list)
    for number in range(16 * 1400):
        part, lane, draw = mixture[number]
        assert lane == number % 16 // (16 // lanes)
        draws[part, lane].append(draw)
    assert {part for part, _ in draws} == {0, 1, 2}
    for numbers in draws.values():
        assert numbers == list(range(len(numbers)))
    assert counted(mixture, 16 * 100, 16 * 1000)[0] == 0
    assert counted(mixture, 0, 16 * 100)[2] == 0


def test_what_a_run_draws_is_what_is_said():
    mixture = Mixture(CHANGING, seed=7, global_batch=16, lanes=4)
    for steps in (1, 60, 100, 1200, 2500):
        found = counted(mixture, 0, 16 * steps)
        assert mixture.drawn("abc", [10, 20, 1000], steps) == [
            Drawn(name, size, found[part], found[part] / size)
            for part, (name, size) in enumerate(zip("abc", [10, 20, 1000]))
        ]


def test_weights_that_cannot_be():
    with pytest.raises(ValueError, match="From step 5 on no part"):
        Mixture((((0, 1.0), (5, 0.0)),), seed=0, global_batch=4)
    with pytest.raises(ValueError, match=r"data\.lanes=3 does not divide the global batch of 4"):
        Mixture((((0, 1.0),),), seed=0, global_batch=4, lanes=3)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_global_epoch_meets_every_record_once(lanes):
    order = GlobalOrder(300, lanes=lanes, key=(1, 2))
    epochs = [
        [order(i % lanes, i // lanes) for i in range(start, start + 300)] for start in (0, 300)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(300)) and epochs[0] != epochs[1]


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_a_window_epoch_meets_every_record_once(lanes):
    ends = np.cumsum([5, 100, 1, 40, 40, 0, 40, 74])
    order = WindowOrder(ends, window=32, lanes=lanes, key=(1, 2))
    shares = [300 * (i + 1) // lanes - 300 * i // lanes for i in range(lanes)]
    for epoch in range(2):
        met = [
            order(lane, epoch * share + i)
            for lane, share in enumerate(shares)
            for i in range(share)
        ]
        assert sorted(met) == list(range(300))


def test_a_lane_reads_few_shards_at_a_time():
    ends = np.arange(1, 101) * 50
    order = WindowOrder(ends, window=200, lanes=4, key=(3,))
    shard = lambda record: int(np.searchsorted(ends, record, "right"))
    whole = [{shard(order(lane, i)) for i in range(1250)} for lane in range(4)]
    assert all(25 <= len(shards) <= 26 for shards in whole)
    assert sum(len(one & other) for one in whole for other in whole if one is not other) <= 6
    window = [order(0, i) for i in range(200)]
    assert len({shard(record) for record in window}) <= 5 and window != sorted(window)
    again = WindowOrder(ends, window=200, lanes=4, key=(3,))
    assert [again(0, i) for i in range(200)] == window
    assert [order(0, 1250 + i) for i in range(200)] != window


def test_windows_beyond_2_31_records():
    ends = np.arange(1, 3001, dtype=np.int64) * 10**6
    order = WindowOrder(ends, window=8192, lanes=1, key=(1, 2))
    window = range(2_600_000_000 // 8192 * 8192, 2_600_000_000 // 8192 * 8192 + 8192)
    found = [order(0, draw) for draw in window]
    assert len(set(found)) == 8192 and all(0 <= record < 3 * 10**9 for record in found)
    assert len({record // 10**6 for record in found}) <= 2


def test_many_parts_keep_their_orders(monkeypatch):
    """Each draws its permutation once an epoch, however many take turns."""
    drawn = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: drawn.append(key) or draw(key))
    whole = [GlobalOrder(50 + i, lanes=1, key=(8, i)) for i in range(30)]
    ends = np.arange(1, 11) * 5
    windows = [WindowOrder(ends, window=50, lanes=1, key=(9, i)) for i in range(30)]
    for i in range(20):
        for order in (*whole, *windows):
            order(0, i)
    assert len(drawn) == 30 + 2 * 30


def test_more_lanes_than_records():
    with pytest.raises(ValueError, match=r"data\.lanes=8 is more than a part's 5 records"):
        WindowOrder(np.array([5]), window=2, lanes=8, key=(0,))
