"""The line in the terminal that says how far a run is."""

from __future__ import annotations

import collections
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_WINDOW = 60.0  # seconds over which the rate is measured


class Progress:
    """Step, rate, time left, and a few values: one moving line on a terminal, else a line at times.

    Args:
        total: steps of the run.
        samples: examples per step.
        title: in front of the line.
        every: seconds between lines where the output is no terminal.
        out: text stream to write to; stderr by default.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        total: int,
        samples: int,
        *,
        title: str = "",
        every: float = 15.0,
        out: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._samples, self._title = total, samples, title
        self._out = out or sys.stderr
        self._tty = self._out.isatty()
        self._between = 0.5 if self._tty else every
        self._clock = clock
        self._seen: collections.deque[tuple[float, int]] = collections.deque()
        self._shown: float | None = None
        self._width = 0

    def rate(self) -> float | None:
        """Steps per second over the last minute, None while there is nothing to tell from.

        The first call of `show` starts the clock: the step before it compiled.
        """
        if len(self._seen) < 2:
            return None
        (before, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - before) if now > before and last > first else None

    def show(self, step: int, values: Mapping[str, float], *, force: bool = False) -> None:
        """Shows the state after `step` updates.

        Args:
            step: updates done.
            values: what to show, name -> value, in order: loss terms, MFU, stall. Names ending in
                ``mfu`` or ``stall`` are shown as a percentage.
            force: print also where the last line is recent.
        """
        now = self._clock()
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()
        recent = self._shown is not None and now - self._shown < self._between
        if recent and not force and step < self._total:
            return
        self._shown = now
        self._put(self.line(step, values))

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """The line without moving anything.

        Args:
            step: updates done.
            values: what to show.

        Returns:
            For example ``stage 1  120/1,000 (12 %)  3.20 steps/s  …``.
        """
        percent = 100 * step // max(self._total, 1)
        parts = [self._title] if self._title else []
        parts.append(f"{step:,}/{self._total:,} ({percent} %)")
        rate = self.rate()
        if rate is not None:
            pace = f"{rate:.2f} steps/s" if rate >= 0.1 else f"{1 / rate:.1f} s/step"
            parts += [pace, f"{rate * self._samples:,.0f} samples/s"]
            if step < self._total:
                parts.append(f"{duration((self._total - step) / rate)} left")
        for name, value in values.items():
            share = name.split("/")[-1] in ("mfu", "stall")
            parts.append(f"{name} {100 * value:.1f} %" if share else f"{name} {value:.4g}")
        return "  ".join(parts)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the moving one.

        Args:
            text: what to say.
        """
        if self._tty and self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._out.write(text + "\n")
        self._out.flush()

    def _put(self, line: str) -> None:
        if not self._tty:
            self._out.write(line + "\n")
        else:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line would not move
            self._out.write("\r" + line.ljust(self._width))
            self._width = len(line)
        self._out.flush()

    def close(self) -> None:
        """Ends the moving line."""
        if self._tty and self._width:
            self._out.write("\n")
            self._out.flush()
            self._width = 0


class ByteProgress(Progress):
    """The same for bytes that are read and written.

    Args:
        total: bytes in all.
        title: in front of the line.
        quiet: show nothing.
        out: text stream to write to; stderr by default.
    """

    def __init__(self, total: int, title: str, *, quiet: bool = False, out: Any = None):
        super().__init__(total, 1, title=title, every=10.0, out=out)
        self._quiet = quiet
        self._began = self._clock()
        self._done = 0

    def counting(self, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same arrays, each counted once the next one is asked for.

        Nothing is said of what is done within a second.
        """
        for x in arrays:
            yield x
            self._done += x.nbytes
            if not self._quiet and self._clock() - self._began > 1.0:
                self.show(self._done, {})

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """For example ``exporting  12.30/27.67 GB (44 %)  0.31 GB/s  50 s left``."""
        percent = 100 * step // max(self._total, 1)
        parts = [self._title, f"{step / 1e9:.2f}/{self._total / 1e9:.2f} GB ({percent} %)"]
        if (rate := self.rate()) is not None:
            parts.append(f"{rate / 1e9:.2f} GB/s")
            if step < self._total:
                parts.append(f"{duration((self._total - step) / rate)} left")
        return "  ".join(parts)


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
