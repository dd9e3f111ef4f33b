"""The progress line, on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest

from internvl_jax.observe.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_a_line_now_and_then():
    out, clock = io.StringIO(), Clock()
    progress = Progress(1000, 32, title="stage 1", every=10, out=out, clock=clock)
    for step in range(1, 51):
        progress.show(step, {"loss": 2.5 / step})
        clock.now += 0.5
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/1,000", "21/1,000", "41/1,000"]
    assert lines[0] == "stage 1  1/1,000 (0 %)  loss 2.5"  # nothing to tell a rate from yet
    expected = "stage 1  21/1,000 (2 %)  2.00 steps/s  64 samples/s  8 min 10 s left  loss 0.119"
    assert lines[1] == expected


def test_the_last_step_is_always_shown():
    out, clock = io.StringIO(), Clock()
    progress = Progress(3, 1, every=1000, out=out, clock=clock)
    for step in (1, 2, 3):
        progress.show(step, {})
        clock.now += 1
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["1/3", "3/3"]
    assert "left" not in out.getvalue()


def test_the_rate_follows_the_last_minute_and_leaves_compilation_out():
    clock = Clock()
    progress = Progress(10_000, 8, out=io.StringIO(), clock=clock)
    clock.now += 300  # compiling
    progress.show(1, {})
    for step in range(2, 100):
        clock.now += 1.0
        progress.show(step, {})
    assert progress.rate() == pytest.approx(1.0)
    for step in range(100, 400):
        clock.now += 0.25
        progress.show(step, {})
    assert progress.rate() == pytest.approx(4.0, rel=0.02)
    assert "4.00 steps/s" in progress.line(400, {})
    slow = Progress(100, 2, out=io.StringIO(), clock=clock)
    slow.show(1, {})
    clock.now += 40
    slow.show(2, {})
    assert "40.0 s/step" in slow.line(2, {}) and "1 h 05 min left" in slow.line(2, {})


def test_resuming_counts_from_the_restored_step():
    clock = Clock()
    progress = Progress(1000, 1, out=io.StringIO(), clock=clock)
    progress.show(901, {})
    clock.now += 10
    progress.show(911, {})
    assert progress.rate() == pytest.approx(1.0)


def test_shares_are_percentages():
    progress = Progress(10, 1, out=io.StringIO())
    assert progress.line(5, {"mfu": 0.4211, "train/stall": 0.0312}).endswith(
        "mfu 42.1 %  train/stall 3.1 %"
    )


def test_a_terminal_has_one_moving_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out, clock = Terminal(), Clock()
    progress = Progress(100, 32, title="stage 1", out=out, clock=clock)
    progress.show(1, {"loss": 1.0, "a_rather_long_name_of_a_value": 3.0})
    progress.show(2, {"loss": 1.0})  # too soon
    assert "\n" not in out.getvalue() and out.getvalue().count("\r") == 1
    assert len(out.getvalue()) == 1 + 39
    progress.note("saved step 2")
    assert out.getvalue().endswith("\r" + " " * 39 + "\rsaved step 2\n")
    clock.now += 1
    progress.show(3, {})
    progress.close()
    progress.close()
    assert out.getvalue().endswith("\n") and out.getvalue().count("\n") == 2


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (190, "3 min 10 s"), (18120, "5 h 02 min"), (1e6, "11 d 13 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
