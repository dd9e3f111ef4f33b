"""Where the time went, and how much of the machine was used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import jax
from etils import epath

log = logging.getLogger(__name__)

FILE = "ledger.jsonl"
KINDS = ("init", "restore", "data", "step", "evaluate", "save")
"""What a run spends seconds on; ``step`` is the useful part."""


def mfu(flops_per_step: float, seconds: float, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation (https://arxiv.org/abs/2204.02311, appendix B).

    Args:
        flops_per_step: analytic model FLOPs of one global step.
        seconds: measured per step.
        peak: FLOP/s of one device, None where there is no figure.
        devices: how many.

    Returns:
        A fraction, or None without a peak.
    """
    return None if peak is None else flops_per_step / (seconds * peak * devices)


class Ledger:
    """Seconds by kind, appended to ``ledger.jsonl`` as the run goes: a killed run leaves its share.

    Every line covers the time since the line before: ``{"run": start time of the process, "time",
    "from": step, "to": step, "wall", "seconds": {kind: …}}``. `goodput` adds them up over all
    processes of a run. Only the first process writes; a disk that takes nothing is said once.

    Args:
        workdir: folder of the run.
        every: seconds between lines; `close` writes the rest.
        clock: seconds, ever growing.
    """

    def __init__(
        self, workdir: str, *, every: float = 30.0, clock: Callable[[], float] = time.monotonic
    ):
        self._path = epath.Path(workdir) / FILE
        self._every, self._clock = every, clock
        self._run, self._began = round(time.time(), 3), clock()
        self._written = self._began
        self._from: int | None = None
        self._before: dict[str, float] = {}
        self._looked: dict[str, float] = {}
        self._failed = False
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the block's wall time to a kind.

        Args:
            kind: one of `KINDS`, or a new one.
        """
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[kind] += self._clock() - began

    def resumed(self, step: int) -> None:
        """Says where this process begins; call it once the state is there.

        Args:
            step: the restored step, 0 for a new run.
        """
        self._from = step

    def window(self) -> dict[str, float]:
        """Seconds by kind since the last call: for rates that compilation doesn't blur.

        Returns:
            Seconds by kind.
        """
        now = dict(self.seconds)
        gone = {kind: value - self._looked.get(kind, 0.0) for kind, value in now.items()}
        self._looked = now
        return gone

    def stall(self) -> float:
        """Share of the stepping time that was spent waiting for data."""
        return stall(self.seconds)

    def mark(self, step: int) -> None:
        """Call now and then: writes a line when the last one is old enough.

        Args:
            step: updates done.
        """
        if self._clock() - self._written >= self._every:
            self._write(step)

    def close(self, first: int, last: int) -> dict[str, float]:
        """Writes what is left.

        Args:
            first: step at which this process began.
            last: step at which it ended.

        Returns:
            Seconds by kind, the whole (``wall``), and ``goodput``: the share spent stepping.
        """
        if self._from is None:
            self._from = first
        self._write(last)
        wall = max(self._clock() - self._began, 1e-9)
        summary = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return summary | {
            "wall": round(wall, 3),
            "goodput": round(self.seconds.get("step", 0.0) / wall, 4),
        }

    def _write(self, step: int) -> None:
        now, seconds = self._clock(), dict(self.seconds)
        gone = {kind: value - self._before.get(kind, 0.0) for kind, value in seconds.items()}
        record = {
            "run": self._run,
            "time": round(time.time(), 3),
            "from": step if self._from is None else self._from,
            "to": step,
            "wall": round(now - self._written, 3),
            "seconds": {kind: round(value, 3) for kind, value in gone.items()},
        }
        self._written, self._from, self._before = now, step, seconds
        if jax.process_index() != 0:
            return
        try:
            self._append(json.dumps(record) + "\n")
        except Exception as error:
            if not self._failed:
                log.error(f"{self._path} cannot be written ({error}); the run goes on without it.")
            self._failed = True

    def _append(self, line: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(self._path):  # an object store cannot append
            before = self._path.read_text() if self._path.exists() else ""
            self._path.write_text(before + line)
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line)


def stall(seconds: Mapping[str, float]) -> float:
    """Share of the stepping time that was spent waiting for data.

    Args:
        seconds: by kind.

    Returns:
        A fraction; 0 where nothing was spent.
    """
    data, step = seconds.get("data", 0.0), seconds.get("step", 0.0)
    return data / (data + step) if data + step else 0.0


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What became of a run's time, over all its restarts.

    Attributes:
        seconds: by kind, from the ledger, all processes together.
        lost: seconds of steps whose results a restart threw away and that were done again.
        down: seconds between the last line of one process and the start of the next.
        other: seconds of a living process outside any kind.
        restarts: how many processes came after the first.
    """

    seconds: dict[str, float]
    lost: float
    down: float
    other: float
    restarts: int

    @property
    def wall(self) -> float:
        """Seconds from the first line to the last."""
        return sum(self.seconds.values()) + self.other + self.down

    @property
    def share(self) -> float:
        """Steps that counted, as a share of all the time."""
        return (self.seconds.get("step", 0.0) - self.lost) / self.wall if self.wall else 0.0


def goodput(workdir: str) -> Goodput:
    """Adds up the ledger of a run.

    Args:
        workdir: folder of the run.

    Returns:
        Its time by what became of it.

    Raises:
        FileNotFoundError: the run has no ledger.
    """
    records = []
    for line in (epath.Path(workdir) / FILE).read_text().splitlines():
        with contextlib.suppress(ValueError):  # half a line of a killed process
            records.append(json.loads(line))
    seconds: dict[str, float] = defaultdict(float)
    lost = down = other = 0.0
    restarts = 0
    counted: list[tuple[int, int, float]] = []  # steps (from, to] and their seconds, as they stand
    for index, record in enumerate(records):
        before = records[index - 1] if index else None
        if before is not None and before["run"] != record["run"]:
            restarts += 1
            down += max(0.0, record["run"] - before["time"])
            kept = []
            for first, last, spent in counted:  # what the new process does again is lost
                part = (min(last, record["from"]) - first) / (last - first)
                part = min(max(part, 0.0), 1.0)
                lost += spent * (1 - part)
                if part:
                    kept.append((first, min(last, record["from"]), spent * part))
            counted = kept
        for kind, value in record["seconds"].items():
            seconds[kind] += value
        other += max(0.0, record["wall"] - sum(record["seconds"].values()))
        if record["to"] > record["from"]:
            counted.append((record["from"], record["to"], record["seconds"].get("step", 0.0)))
    return Goodput(dict(seconds), lost, down, other, restarts)
