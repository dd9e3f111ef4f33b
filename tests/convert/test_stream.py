"""Arrays made ahead: in order, within a limit, errors passed on, the thread gone afterwards."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from internvl_jax.convert.stream import ahead


def running() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_order_and_end() -> None:
    given = [np.full(3, i) for i in range(50)]
    assert [int(x[0]) for x in ahead(iter(given))] == list(range(50))
    assert list(ahead(iter(()))) == [] and not running()


def test_no_more_than_the_limit_waits() -> None:
    made: list[int] = []

    def arrays() -> Iterator[np.ndarray]:
        for i in range(8):
            made.append(i)
            yield np.zeros(100, np.uint8)

    with contextlib.closing(ahead(arrays(), limit=250)) as taken:
        next(taken)
        time.sleep(0.2)  # the thread does what it may
        # One taken, two waiting, one made that finds no room.
        assert made == [0, 1, 2, 3]
    assert not running()


def test_an_array_beyond_the_limit_passes_alone() -> None:
    given = [np.zeros(n, np.uint8) for n in (1000, 10, 1000)]
    assert [x.size for x in ahead(iter(given), limit=100)] == [1000, 10, 1000]


def test_what_fails_there_fails_here_after_what_came_before() -> None:
    def arrays() -> Iterator[np.ndarray]:
        yield np.ones(1)
        raise OSError("the disk")

    taken = ahead(arrays())
    assert next(taken)[0] == 1
    with pytest.raises(OSError, match="the disk"):
        next(taken)
    assert not running()
