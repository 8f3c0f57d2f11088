"""What the threads that use a GPU lend each other: its memory, by the byte, pinned slots, and lanes."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lox_stream.cards import Card, Event, Lane
from lox_stream.costs import SLOT_BYTES, SLOTS
from lox_stream.kernels import Run


class Slots:
    """Pinned memory that is lent out: a slot is ready once the last copy from or to it is done."""

    def __init__(self, card: Card) -> None:
        self._free: queue.SimpleQueue[tuple[Tensor, Event | None]] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._free.put((card.pinned(SLOT_BYTES), None))

    @contextmanager
    def lent(self) -> Iterator[Loan]:
        memory, busy = self._free.get()
        loan = Loan(memory, None)
        try:
            if busy is not None:
                busy.wait()
            yield loan
        finally:
            self._free.put((memory, loan.busy))


@dataclass(slots=True)
class Loan:
    """A slot; `busy` is the event after which it may be used again."""

    memory: Tensor
    busy: Event | None


class Lanes:
    """Some lanes, each lent to one thread at a time."""

    def __init__(self, card: Card, count: int) -> None:
        self.all = tuple(card.lane() for _ in range(count))
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in self.all:
            self._free.put(lane)

    @contextmanager
    def lent(self, run: Run) -> Iterator[Lane]:
        """Raises Cancelled where `run` does so once a lane is free."""
        lane = self._free.get()
        try:
            run(lambda _: None, 1)
            yield lane
        finally:
            self._free.put(lane)


class Budget:
    """So many bytes of the card's memory; whoever asks for more than is left waits, and who comes after waits too."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = self._left = n_bytes
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def held(self, n_bytes: int, run: Run) -> Iterator[None]:
        """Who asks for more than there is gets all of it. Raises Cancelled where `run` does so while this waits."""
        self._take(n_bytes, run)
        try:
            yield
        finally:
            with self._changed:
                self._left += n_bytes
                self._changed.notify_all()

    def _take(self, n_bytes: int, run: Run) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or self._left < min(n_bytes, self.n_bytes):
                    run(lambda _: None, 1)
                    self._changed.wait(timeout=0.1)
                self._left -= n_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def lower(self, n_bytes: int) -> None:
        """There are only so many from now on."""
        with self._changed:
            gone = max(0, self.n_bytes - n_bytes)
            self.n_bytes -= gone
            self._left -= gone
