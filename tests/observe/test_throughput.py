"""The ledger of seconds, goodput over restarts, MFU; and the profiler window."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from internvl_jax.observe.profile import Profiler
from internvl_jax.observe.throughput import Ledger, goodput, mfu, stall


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def spend(ledger, clock, **kinds):
    for kind, seconds in kinds.items():
        with ledger.timed(kind):
            clock.now += seconds


def lines(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_mfu():
    assert mfu(0.5 * 4 * 275e12, 1.0, 275e12, 4) == pytest.approx(0.5)
    assert mfu(1e12, 2.0, None, 4) is None


def test_seconds_by_kind(tmp_path):
    clock = Clock()
    ledger = Ledger(str(tmp_path), clock=clock)
    spend(ledger, clock, init=5, data=1, step=3)
    assert ledger.stall() == pytest.approx(0.25)
    assert ledger.window() == {"init": 5, "data": 1, "step": 3}
    spend(ledger, clock, data=0, step=4)
    assert ledger.window() == {"init": 0, "data": 0, "step": 4} and stall({}) == 0
    with pytest.raises(KeyError), ledger.timed("save"):
        clock.now += 2
        raise KeyError
    clock.now += 5  # between blocks
    summary = ledger.close(10, 12)
    expected = {"init": 5, "data": 1, "step": 7, "save": 2, "wall": 20, "goodput": 0.35}
    assert summary == pytest.approx(expected)
    (line,) = lines(tmp_path)
    assert (line["from"], line["to"], line["wall"]) == (10, 12, 20)
    assert line["seconds"] == {"init": 5, "data": 1, "step": 7, "save": 2}


def test_a_killed_process_leaves_its_lines(tmp_path):
    clock = Clock()
    ledger = Ledger(str(tmp_path), every=10, clock=clock)
    ledger.resumed(0)
    for step in range(1, 8):
        spend(ledger, clock, data=1, step=3)
        ledger.mark(step)
    assert [(x["from"], x["to"], x["wall"]) for x in lines(tmp_path)] == [(0, 3, 12), (3, 6, 12)]
    assert lines(tmp_path)[1]["seconds"] == {"data": 3, "step": 9}


def test_goodput_counts_what_was_done_twice_as_lost(tmp_path):
    def line(run, time, first, last, wall, **seconds):
        record = {"run": run, "time": time, "from": first, "to": last}
        return json.dumps(record | {"wall": wall, "seconds": seconds}) + "\n"

    (tmp_path / "ledger.jsonl").write_text(
        line(0, 40, 0, 10, 40, init=10, step=20, data=5)
        + line(0, 80, 10, 20, 40, step=40)
        + '{"run": 0, "time": 9'  # killed
        + "\n"
        + line(100, 150, 15, 30, 50, init=5, step=45)
        + line(200, 210, 0, 1, 10, step=10)
    )
    report = goodput(str(tmp_path))
    assert report.restarts == 2
    assert report.seconds == {"init": 15, "step": 115, "data": 5}
    assert report.down == (100 - 80) + (200 - 150)
    assert report.other == 5
    # 15..20 of the first process again by the second; everything again by the third.
    assert report.lost == pytest.approx(20 + (20 + 20 + 45))
    assert report.wall == 135 + 5 + 70
    assert report.share == pytest.approx(10 / 210)


def test_a_ledger_that_can_not_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    clock = Clock()
    ledger = Ledger(str(tmp_path / "file"), every=0, clock=clock)
    for step in range(3):
        spend(ledger, clock, step=1)
        ledger.mark(step)
    assert ledger.close(0, 3)["step"] == 3
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.text


def test_only_the_first_process_keeps_a_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Ledger(str(tmp_path)).close(0, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_chosen_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(str(tmp_path), (3, 4))
    seen = []
    for step in range(7):
        profiler.step(step)
        seen.append(len(calls))
    profiler.close()
    assert calls == [f"{tmp_path}/profile", "stop"]
    assert seen == [0, 0, 0, 1, 1, 2, 2]
    Profiler(str(tmp_path), ()).step(3)
    late = Profiler(str(tmp_path), (3, 9))  # resumed at 5, ended at 6
    late.step(5)
    late.close()
    assert calls[2:] == [f"{tmp_path}/profile", "stop"]
    with pytest.raises(ValueError, match="must be two steps in order"):
        Profiler(str(tmp_path), (4, 3))


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_failing_profiler_does_not_end_the_run(tmp_path, monkeypatch, caplog, broken):
    def fail(*arguments):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, broken, fail)
    profiler = Profiler(str(tmp_path), (0, 1))
    for step in range(4):
        profiler.step(step)
    profiler.close()
    assert [m for m in caplog.messages if "no profiler here" in m] == caplog.messages[:1]


def test_a_real_trace_is_written(tmp_path):
    profiler = Profiler(str(tmp_path), (1, 1))
    for step in range(3):
        profiler.step(step)
        jnp.ones(4).sum().block_until_ready()
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
