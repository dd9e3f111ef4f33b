"""Long work over many files: in several processes, resumable, with progress."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run(
    jobs: Iterable[Job], work: Callable[[Job], Result], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Does jobs, a few at a time.

    Args:
        jobs: may be produced as they are needed.
        work: a function of a module; what it raises ends the run.
        workers: processes; 1 works in this one.

    Yields:
        (job, result) in the order in which they are done.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job)
        return
    # Spawned, not forked: a fork copies the locks of threads that it does not copy.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_follow_parent
    )
    waiting: dict[concurrent.futures.Future[Result], Job] = {}
    try:
        for job in jobs:
            waiting[pool.submit(work, job)] = job
            if len(waiting) >= 2 * workers:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(
    waiting: dict[concurrent.futures.Future[Result], Job],
) -> Iterator[tuple[Job, Result]]:
    done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _follow_parent() -> None:
    # A parent that is killed cannot stop its workers; they would wait for jobs for ever.
    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Journal:
    """What is done already, a line each; a line torn by a crash counts as not done."""

    def __init__(self, path: pathlib.Path | None, settings: Mapping[str, Any]):
        """Opens the journal of a folder, or begins one.

        Args:
            path: the file; None keeps none.
            settings: of this run; the journal of a run with others is not taken up.

        Raises:
            ValueError: if the folder was begun with other settings.
        """
        self.path, self.done = path, {}
        self._file: TextIO | None = None
        if path is None:
            return
        wanted = json.loads(json.dumps(settings))
        begun = False
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    if begun:
                        self.done[entry["name"]] = entry["result"]
                        continue
                except (ValueError, KeyError, TypeError):
                    continue
                begun = True
                differ = [key for key in wanted if entry.get(key) != wanted[key]]
                if differ:
                    raise ValueError(
                        f"{path.parent} was begun with another {' and '.join(differ)}; delete "
                        f"{path} and what was written, or choose another folder."
                    )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        # After a torn line, the next begins on its own.
        self._file.write("\n" if begun else json.dumps(wanted) + "\n")
        self._file.flush()

    def add(self, name: str, result: Any) -> None:
        """Notes something as done.

        Args:
            name: of it.
            result: as JSON has it.
        """
        self.done[name] = result
        if self._file is not None:
            self._file.write(json.dumps({"name": name, "result": result}) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """Says that all is done: the journal is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()


class Progress:
    """A line of progress every few seconds: share done, rate, time left."""

    def __init__(self, what: str, unit: str, out: TextIO | None = None):
        """Begins to count.

        Args:
            what: is being done.
            unit: what is counted, in the plural.
            out: where lines go; standard error by default.
        """
        self._what, self._unit, self._out = what, unit, out or sys.stderr
        self._started = self._shown = time.monotonic()
        self._first: float | None = None

    def update(self, share: float, count: int, *, note: str = "", last: bool = False) -> None:
        """Says how far it is, if that is due.

        Args:
            share: of the work that is done, 0 to 1.
            count: units done by this run.
            note: what else there is to say.
            last: it is the last line.
        """
        now = time.monotonic()
        # What an earlier run did was done in no time; it must not count for the rate.
        self._first = share if self._first is None else self._first
        terminal = self._out.isatty()
        if not last and now - self._shown < (0.5 if terminal else 10):
            return
        self._shown = now
        seconds = max(now - self._started, 1e-9)
        ahead = seconds * (1 - share) / max(share - self._first, 1e-9)
        left = f"after {clock(seconds)}" if last else f"{clock(ahead)} left"
        line = (
            f"{self._what}: {share:.1%}, {count:,} {self._unit}, {count / seconds:,.0f}/s, {left}"
        )
        line += f", {note}" if note else ""
        print(
            f"\r{line}\x1b[K" if terminal else line,
            end="\n" if last or not terminal else "",
            file=self._out,
            flush=True,
        )


def clock(seconds: float) -> str:
    """A time as people read it.

    Args:
        seconds: of it.

    Returns:
        E.g. "40 s", "12 min", "3.5 h".
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
