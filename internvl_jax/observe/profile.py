"""A profiler window on request."""

from __future__ import annotations

import logging

import jax

log = logging.getLogger(__name__)


class Profiler:
    """Traces steps first..last into ``<workdir>/profile`` (open it with XProf or Perfetto).

    Args:
        workdir: folder of the run.
        window: (first, last) step, or empty for none.
    """

    def __init__(self, workdir: str, window: tuple[int, ...]):
        self._folder, self._window, self._on = f"{workdir}/profile", window, False

    def step(self, step: int) -> None:
        """Call before every step; starts and stops the trace. A failing profiler is only logged."""
        if not self._window:
            return
        try:
            if step == self._window[0] and not self._on:
                jax.profiler.start_trace(self._folder)
                self._on = True
            elif step > self._window[1]:
                self.close()
        except Exception as error:
            log.error(f"The profiler failed ({error}); the run goes on without it.")
            self._window = ()

    def close(self) -> None:
        """Ends a trace under way."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.warning(f"A profile is in {self._folder}.")
