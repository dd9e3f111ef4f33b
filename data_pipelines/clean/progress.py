"""Lines that say how far a step is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Progress:
    """Says at times how many jobs are done and how long the others will take.

    Args:
        title: of the step.
        weights: of the jobs in the order of their beginning, e.g. bytes.
        report: gets the lines.
        every: seconds between lines.
    """

    def __init__(
        self,
        title: str,
        weights: Sequence[int],
        report: Callable[[str], None],
        every: float = 10.0,
    ):
        self.title, self.weights, self.report, self.every = title, weights, report, every
        self.done, self.weight, self.total = 0, 0, sum(weights) or 1
        self.started = self.shown = time.monotonic()

    def step(self) -> None:
        """One more job is done."""
        # Jobs may end in another order; the weights of as many say enough for a time left.
        self.weight += self.weights[self.done]
        self.done += 1
        now = time.monotonic()
        last = self.done == len(self.weights)
        if now - self.shown < self.every and not last:
            return
        self.shown, passed = now, now - self.started
        left = passed * (self.total - self.weight) / max(self.weight, 1)
        rate = self.done / max(passed, 1e-9)
        took = f"{passed:.0f} s" if last else f"{left:.0f} s left"
        self.report(
            f"{self.title}: {self.done} of {len(self.weights)}, {rate:.2g} a second, {took}"
        )
