"""The line in the terminal that says how far a run is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Progress:
    """Step, rate, time left, and a few values; one moving line on a terminal, a line now and then in
    a log file.

    Args:
        total: steps of the run.
        samples: examples per step.
        title: in front of the line.
        every: seconds between lines where the output is no terminal.
    """

    def __init__(
        self, total: int, samples: int, *, title: str = "", every: float = 15.0, out: TextIO | None = None
    ):
        self._total, self._samples, self._title, self._every = total, samples, title, every
        self._out = out or sys.stderr
        self._tty = self._out.isatty()
        self._start: tuple[float, int] | None = None
        self._shown = 0.0
        self._width = 0

    def show(self, step: int, values: Mapping[str, float], *, force: bool = False) -> None:
        """Shows the state after `step` updates.

        Args:
            step: updates done.
            values: what to show, name -> value, in order.
            force: print also where the last line is recent.
        """
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)  # the first step compiles: rates start after it
        if not (force or step >= self._total or now - self._shown >= (0.5 if self._tty else self._every)):
            return
        self._shown = now
        seconds, done = now - self._start[0], step - self._start[1]
        rate = done / seconds if done and seconds > 0 else 0.0
        left = duration((self._total - step) / rate) if rate else "?"
        parts = [f"{self._title} {step:,}/{self._total:,}".strip(), f"{rate:.2f} steps/s"]
        parts += [f"{rate * self._samples:,.0f} samples/s", f"{left} left"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        line = "  ".join(parts)
        if self._tty:
            self._out.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def close(self) -> None:
        """Ends the moving line."""
        if self._tty and self._width:
            self._out.write("\n")
            self._width = 0


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 5 h 02 min, 12 d 3 h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
