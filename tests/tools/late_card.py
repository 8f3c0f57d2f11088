"""A card whose lanes do nothing until somebody waits, and then no more than that waiting asks for.

It keeps the promises of `lox_stream.cards` and no others: what a lane was not told to wait for has not happened when it
goes on, a slot that is given back is overwritten as soon as its last copy is done (`spoil`), and memory that nobody
wrote is poison.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pretend_gpu import GPU, PretendGPU
from torch import Tensor

_here = threading.local()


def plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor)


def lane_here() -> LateLane | None:
    """The lane that this thread has entered."""
    return getattr(_here, "lane", None)


def spoil(slot: Tensor, busy: LateEvent | None) -> None:
    """Overwrite memory that was given back with the event after which it may be used again: NaN in every dtype."""
    if busy is None:
        slot.fill_(0xFF)
    else:
        busy.then(lambda: slot.fill_(0xFF))


class LateCard:
    """On the CPU's memory, behind `PretendGPU`."""

    def __init__(self) -> None:
        self.device = GPU
        self.closed = False
        self.working = threading.RLock()

    def lane(self) -> LateLane:
        return LateLane(self)

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return 1 << 30

    def bound(self, n_bytes: int) -> None:
        self.bound_bytes = n_bytes

    def trim(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        if getattr(_here, "pretends", False):  # a mode within itself would take its own tensors for the host's
            yield
            return
        _here.pretends = True
        try:
            with PretendGPU() as gpu:
                gpu.before_work = _catch_up
                yield
        finally:
            _here.pretends = False


def _catch_up() -> None:
    """What torch does itself in a lane that is entered comes after all that the lane was given before."""
    lane = lane_here()
    if lane is not None:
        lane.advance(len(lane.given))


class LateLane:
    def __init__(self, card: LateCard) -> None:
        self.card = card
        self.given: list[Callable[[], object]] = []
        self._done = 0
        self._advancing = False
        self._failed: dict[int, Exception] = {}  # what a thread launched and another one carried out

    @property
    def left(self) -> int:
        """Of what was given, how much is not done."""
        return len(self.given) - self._done

    def copy(self, to: Tensor, source: Tensor) -> None:
        self._give(lambda: plain(to).copy_(plain(source)))

    def launch(self, work: Callable[[], None]) -> None:
        """Whoever launched work that fails is told, when it waits next, whoever else came upon it first."""
        launcher = threading.get_ident()

        def there() -> None:
            try:
                with self.card.entered():
                    work()
            except Exception as error:
                if threading.get_ident() != launcher:
                    self._failed[launcher] = error
                raise

        self._give(there)

    @contextmanager
    def entered(self) -> Iterator[None]:
        before, _here.lane = lane_here(), self
        try:
            yield
        finally:
            _here.lane = before

    def record(self) -> LateEvent:
        with self.card.working:
            return LateEvent(self, len(self.given))

    def wait_for(self, event: LateEvent) -> None:
        self._give(event.wait)

    def _give(self, work: Callable[[], object]) -> None:
        with self.card.working:
            self.given.append(work)

    def advance(self, place: int) -> None:
        with self.card.working:
            if self._advancing:  # this very thread is in the middle of the work before
                return
            self._advancing = True
            try:
                while self._done < place:
                    self._done += 1
                    self.given[self._done - 1]()
            finally:
                self._advancing = False
            failed = self._failed.pop(threading.get_ident(), None)
            if failed is not None:
                raise failed


class LateEvent:
    def __init__(self, lane: LateLane, place: int) -> None:
        self.lane, self.place = lane, place

    def wait(self) -> None:
        self.lane.advance(self.place)

    def then(self, work: Callable[[], object]) -> None:
        """Do something the moment this point is reached, before the lane does anything else."""
        with self.lane.card.working:
            if self.lane.left <= len(self.lane.given) - self.place:
                work()
                return
            last = self.lane.given[self.place - 1]
            self.lane.given[self.place - 1] = lambda: (last(), work())
