"""Notice a SIGTERM in time: every process hears of it at the same step, saves and leaves."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class Preemption:
    """Tells, once per step, whether the machine is about to be taken away.

    Where ``jax.distributed`` is initialised, its preemption service receives the SIGTERM of any
    process and agrees on a step that all of them reach. Elsewhere a signal handler of our own
    raises a flag (jax would let the process die); ``close`` puts the former handler back.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM,)) -> None:
        """Start listening.

        Args:
            signals: listened to in a process without ``jax.distributed``.
        """
        self._noticed = False
        self._former: dict[int, Any] = {}
        self._distributed = jax.distributed.is_initialized()
        if self._distributed:
            return
        try:
            for number in signals:
                self._former[number] = signal.signal(number, self._notice)
        except ValueError:
            log.warning("SIGTERM can't be caught outside the main thread: saves are periodic only.")

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = True

    def requested(self, step: int) -> bool:
        """Whether to save now and leave; call it at every step, on every process.

        Args:
            step: the step just done; the same on every process.

        Returns:
            The same answer on every process; once True it stays True.
        """
        if self._distributed and not self._noticed:
            try:
                self._noticed = multihost_utils.reached_preemption_sync_point(step)
            except RuntimeError as error:
                log.warning(f"preemption is not noticed ({error}): saves are periodic only.")
                self._distributed = False
        return self._noticed

    def close(self) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
