"""Where the time went, and how much of the machine was used."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator

import jax
from etils import epath

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
    """Seconds by kind over the life of one process, written as one JSON line when it ends.

    Args:
        workdir: the line is appended to ``ledger.jsonl`` there, on the first process.
    """

    def __init__(self, workdir: str):
        self._path = epath.Path(workdir) / "ledger.jsonl"
        self._began = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Adds the block's wall time to a kind."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[kind] += time.monotonic() - began

    def stall(self) -> float:
        """Share of the stepping time that was spent waiting for data."""
        total = self.seconds["data"] + self.seconds["step"]
        return self.seconds["data"] / total if total else 0.0

    def close(self, first: int, last: int) -> dict[str, float]:
        """Writes the line.

        Args:
            first: step at which this process began.
            last: step at which it ended.

        Returns:
            Seconds by kind, the whole, and goodput: the share spent stepping.
        """
        wall = time.monotonic() - self._began
        summary = {k: round(v, 3) for k, v in self.seconds.items()}
        summary |= {"wall": round(wall, 3), "goodput": round(self.seconds["step"] / wall, 4)}
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                before = self._path.read_text() if self._path.exists() else ""
                line = json.dumps({"first_step": first, "last_step": last, **summary})
                self._path.write_text(before + line + "\n")
        return summary
