"""What is open, bounded: the least recently used is closed first."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class _Slot:
    __slots__ = ("bytes", "evicted", "lock", "opened", "users", "value")

    def __init__(self):
        self.value: Any = None
        self.bytes = self.users = 0
        self.opened = self.evicted = False
        self.lock = threading.Lock()


class Lru(Generic[Value]):
    """Opens things by key and keeps the recently used; threads may share it.

    What is lent is never closed under its user, so there may be one more open per thread.
    """

    def __init__(
        self,
        open: Callable[[Any], tuple[Value, int]],
        close: Callable[[Value], None],
        *,
        items: int,
        bytes: int,
    ):
        """Sets the bounds.

        Args:
            open: key -> (value, the bytes it holds on to).
            close: gives a value back.
            items: most values kept.
            bytes: most bytes kept; one value alone may be larger.
        """
        self._open, self._close, self._items, self._limit = open, close, items, bytes
        self._slots: dict[Any, _Slot] = {}  # the least recently used first
        self._held = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._slots)

    @contextlib.contextmanager
    def lend(self, key: Any) -> Iterator[Value]:
        """Opens a value, or takes the open one, for the length of a ``with``.

        Args:
            key: what `open` takes.

        Yields:
            The value.
        """
        with self._lock:
            slot = self._slots.pop(key, None) or _Slot()
            self._slots[key] = slot
            slot.users += 1
        try:
            if not slot.opened:
                self._fill(key, slot)
            yield slot.value
        finally:
            with self._lock:
                slot.users -= 1
                # Whoever waits for it still tries; what that opens must be known, to be closed.
                if not slot.opened and not slot.users and self._slots.get(key) is slot:
                    del self._slots[key]
                last = slot.opened and slot.evicted and not slot.users
            if last:
                self._close(slot.value)

    def _fill(self, key: Any, slot: _Slot) -> None:
        with slot.lock:  # others that want it wait here, those that want another do not
            if slot.opened:
                return
            slot.value, slot.bytes = self._open(key)
            with self._lock:
                slot.opened = True
                if not slot.evicted:
                    self._held += slot.bytes
                closing = self._evict(self._items, self._limit, keep=slot)
        for value in closing:
            self._close(value)

    def _evict(self, items: int, limit: int, keep: _Slot | None = None) -> list[Value]:
        closing = []
        for key, slot in list(self._slots.items()):
            if len(self._slots) <= items and self._held <= limit:
                break
            if slot is keep or not slot.opened:
                continue
            del self._slots[key]
            slot.evicted = True
            self._held -= slot.bytes
            if not slot.users:
                closing.append(slot.value)
        return closing

    def close(self) -> None:
        """Closes everything that nobody uses, and the rest when it comes back."""
        with self._lock:
            closing = self._evict(0, -1)
        for value in closing:
            self._close(value)
