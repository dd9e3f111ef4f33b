"""A profiler window on request."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence

import jax

log = logging.getLogger(__name__)


class Profiler:
    """Traces steps first..last into ``<workdir>/profile`` (open it with XProf or Perfetto).

    A failing profiler costs the profile and never the run.

    Args:
        workdir: folder of the run.
        window: (first, last) step, both included, or empty for none.

    Raises:
        ValueError: the window is no pair of steps in order.
    """

    def __init__(self, workdir: str, window: Sequence[int] = ()):
        if window and (len(window) != 2 or not 0 <= window[0] <= window[1]):
            raise ValueError(f"the profile window {tuple(window)} must be two steps in order.")
        self._folder, self._window, self._on = f"{workdir}/profile", tuple(window), False
        # libtpu's profiler takes the process down where another backend was picked for it.
        unsafe = (
            importlib.util.find_spec("libtpu") is not None and "JAX_PLATFORMS" not in os.environ
        )
        if self._window and unsafe and jax.default_backend() != "tpu":
            log.error(
                "No profile: with libtpu installed and no TPU, set JAX_PLATFORMS to take one."
            )
            self._window = ()

    def step(self, step: int) -> None:
        """Call before every step, with its number; starts and stops the trace.

        Args:
            step: the step about to run. A run that begins inside the window traces the rest of it.
        """
        if not self._window:
            return
        first, last = self._window
        if first <= step <= last and not self._on:
            try:
                jax.profiler.start_trace(self._folder)
                self._on = True
            except Exception as error:
                log.error(f"The profiler failed ({error}); the run goes on without it.")
                self._window = ()
        elif step > last:
            self.close()

    def close(self) -> None:
        """Ends a trace under way."""
        self._window = ()
        if not self._on:
            return
        self._on = False
        try:
            jax.profiler.stop_trace()
            log.warning(f"A profile is in {self._folder}.")
        except Exception as error:
            log.error(f"The profiler failed ({error}); the run goes on without it.")
