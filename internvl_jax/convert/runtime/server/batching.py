"""One thread owns the engine; items of the same kind are computed together."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .limits import Refusal, full

Key = tuple[Any, ...]  # hashable
Compute = Callable[[Key, list], list]


@dataclasses.dataclass(frozen=True)
class Queue:
    """How items wait.

    Attributes:
        max_batch: items in a batch.
        max_wait: seconds that an item waits for company.
        max_queue: items that wait; more are refused.
    """

    max_batch: int = 16
    max_wait: float = 0.005
    max_queue: int = 256

    def __post_init__(self):
        if self.max_batch < 1 or self.max_queue < 1 or not 0 <= self.max_wait < float("inf"):
            raise ValueError(
                f"max_batch={self.max_batch}, max_queue={self.max_queue}, "
                f"max_wait={self.max_wait}: use at least 1, 1 and 0."
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """One item in the queue."""

    key: Key
    item: Any
    since: float  # time.monotonic()
    result: Future = dataclasses.field(default_factory=Future)


class Batcher:
    """A queue before a function that takes batches and is not thread-safe.

    The oldest item decides which key is next, so no kind of request waits for ever. A batch starts
    when it is full or its oldest item has waited long enough; what queued up meanwhile joins.
    Where a batch fails, its items are tried one by one, and only those fail that fail alone.

    Args:
        compute: from a key and the items with that key to as many results, in order.
        queue: how they wait.
        seen: called with the key, the number of items and the seconds of every batch.
    """

    def __init__(
        self,
        compute: Compute,
        queue: Queue = Queue(),
        seen: Callable[[Key, int, float], None] = lambda key, size, seconds: None,
    ):
        self._compute, self._queue, self._seen = compute, queue, seen
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, key: Key, items: Sequence) -> list:
        """The results of some items, which may be computed in several batches with others.

        If the caller is cancelled, what is not yet under way is dropped.

        Args:
            key: only items with equal keys share a batch.
            items: any number.

        Returns:
            One result for every item.

        Raises:
            Refusal: 503, if not all of the items have a place in the queue.
            Exception: what `compute` raised for the first of the items that failed.
        """
        since = time.monotonic()
        jobs = [Job(key, item, since) for item in items]
        with self._changed:
            if self._closing:
                raise full("it is shutting down")
            self._forget()
            if len(jobs) > self._queue.max_queue:
                raise Refusal(
                    413, f"A request of {len(jobs)} items never fits the queue: send fewer."
                )
            if len(self._jobs) + len(jobs) > self._queue.max_queue:
                raise full("its queue is full")
            self._jobs += jobs
            self._changed.notify()
        try:
            return await asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
        finally:
            for job in jobs:
                job.result.cancel()  # of what is done or under way, this does nothing

    @property
    def waiting(self) -> int:
        """How many items wait."""
        with self._changed:
            self._forget()
            return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether items are taken."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Computes what waits, then ends."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _forget(self) -> None:
        self._jobs = [job for job in self._jobs if not job.result.cancelled()]

    def _next(self) -> list[Job]:
        """Waits for a batch; empty at the end."""
        with self._changed:
            while True:
                self._forget()
                if self._jobs:
                    oldest = self._jobs[0]
                    batch = [job for job in self._jobs if job.key == oldest.key][
                        : self._queue.max_batch
                    ]
                    left = oldest.since + self._queue.max_wait - time.monotonic()
                    if len(batch) == self._queue.max_batch or left <= 0 or self._closing:
                        chosen = {id(job) for job in batch}
                        self._jobs = [job for job in self._jobs if id(job) not in chosen]
                        return batch
                    self._changed.wait(left)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()

    def _work(self) -> None:
        while batch := self._next():
            # From here on a job cannot be cancelled; one that has been has no one waiting for it.
            batch = [job for job in batch if job.result.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[Job]) -> None:
        key, start = batch[0].key, time.monotonic()
        try:
            results = self._compute(key, [job.item for job in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(batch)} items had {len(results)} results.")
        except Exception as error:
            self._seen(key, len(batch), time.monotonic() - start)
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for job in batch:
                self._answer([job])
            return
        self._seen(key, len(batch), time.monotonic() - start)
        for job, result in zip(batch, results):
            job.result.set_result(result)
