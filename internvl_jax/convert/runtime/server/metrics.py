"""Counts and seconds, in the text form that Prometheus reads."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number per set of labels that only grows."""

    kind = "counter"

    def __init__(self):
        self.values: defaultdict[Labels, float] = defaultdict(float)

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        self.values[labels] += amount

    def lines(self, name: str) -> list[str]:
        return [_line(name, labels, value) for labels, value in sorted(self.values.items())]


class Histogram:
    """How many values were at most as large as each bound, per set of labels.

    Args:
        bounds: ascending.
    """

    kind = "histogram"

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts: defaultdict[Labels, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self.sums: defaultdict[Labels, float] = defaultdict(float)

    def add(self, labels: Labels, value: float) -> None:
        place = sum(value > bound for bound in self.bounds)
        self.counts[labels][place] += 1
        self.sums[labels] += value

    def lines(self, name: str) -> list[str]:
        lines = []
        for labels, counts in sorted(self.counts.items()):
            total = 0
            for bound, count in zip((*map(repr, self.bounds), "+Inf"), counts):
                total += count
                lines.append(_line(f"{name}_bucket", (*labels, ("le", bound)), total))
            lines.append(_line(f"{name}_sum", labels, self.sums[labels]))
            lines.append(_line(f"{name}_count", labels, total))
        return lines


class Metrics:
    """What the server counts. Any thread may add.

    Args:
        waiting: the length of the queue, asked whenever the metrics are read.
    """

    def __init__(self, waiting: Callable[[], int] = lambda: 0):
        self._lock = threading.Lock()
        self._waiting = waiting
        self._requests, self._seconds = Counter(), Histogram(SECONDS)
        self._batch, self._batch_seconds = Histogram(SIZES), Histogram(SECONDS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        with self._lock:
            self._requests.add((("route", route), ("status", str(status))))
            self._seconds.add((("route", route),), seconds)

    def batch(self, kind: str, size: int, seconds: float) -> None:
        """Counts a computed batch."""
        with self._lock:
            self._batch.add((("kind", kind),), size)
            self._batch_seconds.add((("kind", kind),), seconds)

    def text(self) -> str:
        """Everything, in Prometheus' text form 0.0.4."""
        waiting = self._waiting()
        with self._lock:
            families = [
                ("requests_total", "Requests by route and status.", self._requests),
                ("request_seconds", "From a request's headers to its answer.", self._seconds),
                ("batch_size", "Items that were computed together.", self._batch),
                ("batch_seconds", "Seconds of one batch.", self._batch_seconds),
            ]
            lines = []
            for name, meaning, family in families:
                name = f"internvl_{name}"
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {family.kind}"]
                lines += family.lines(name)
        lines += [
            "# HELP internvl_queue_length Items that wait for the engine.",
            "# TYPE internvl_queue_length gauge",
            f"internvl_queue_length {waiting}",
        ]
        return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"{name}{{{inside}}} {value:.10g}"
