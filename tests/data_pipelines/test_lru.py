"""What is open, bounded."""

from __future__ import annotations

import threading

import pytest

from data_pipelines.sources.lru import Lru


@pytest.fixture
def log():
    return []


def make(log, **bounds):
    def open(key):
        if key < 0:
            raise OSError("gone")
        log.append(f"+{key}")
        return key, 10 * key

    return Lru(open, lambda key: log.append(f"-{key}"), **{"items": 2, "bytes": 1000, **bounds})


def use(lru, *keys):
    for key in keys:
        with lru.lend(key) as value:
            assert value == key


def test_the_least_recently_used_goes_first(log):
    use(make(log), 1, 2, 1, 3, 1, 2)
    assert log == ["+1", "+2", "+3", "-2", "+2", "-3"]


def test_bytes_count_too(log):
    lru = make(log, items=9, bytes=50)
    use(lru, 1, 2, 3, 9, 9)
    assert log == ["+1", "+2", "+3", "-1", "+9", "-2", "-3"] and len(lru) == 1


def test_what_is_lent_is_closed_when_it_comes_back(log):
    lru = make(log, items=1)
    with lru.lend(1):
        use(lru, 2, 3)
        lru.close()
        assert "-1" not in log
    assert log == ["+1", "+2", "+3", "-2", "-3", "-1"] and not len(lru)


def test_what_cannot_be_opened_leaves_nothing_behind(log):
    lru = make(log)
    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            use(lru, -1)
    assert not len(lru) and not log


def test_two_that_want_the_same_open_it_once(log):
    gate, opened = threading.Event(), []

    def open(key):
        opened.append(key)
        gate.wait(5)
        return key, 0

    lru = Lru(open, lambda key: None, items=2, bytes=0)
    threads = [threading.Thread(target=use, args=(lru, 7)) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert opened == [7]


def test_a_second_attempt_of_one_who_waited_is_closed_too():
    """The first fails to open it while another waits; what that one then opens is not lost."""
    waiting, log = threading.Event(), []

    def open(key):
        log.append("try")
        if len(log) == 1:
            waiting.wait(5)
            raise OSError("flaky")
        return key, 10

    lru = Lru(open, lambda key: log.append("close"), items=2, bytes=100)

    def first():
        with pytest.raises(OSError, match="flaky"):
            use(lru, 7)

    threads = [threading.Thread(target=first), threading.Thread(target=use, args=(lru, 7))]
    threads[0].start()
    while not log:
        pass
    threads[1].start()
    while not any(slot.users == 2 for slot in lru._slots.values()):
        pass
    waiting.set()
    for thread in threads:
        thread.join()
    assert len(lru) == 1
    lru.close()
    assert log == ["try", "try", "close"]
