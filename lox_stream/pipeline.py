"""Overlaps reading, solving, updating and writing: the only place that sees every stage.

    Prefetch thread --fetched--> admission, here --job--> Workers --finished--> the caller of `compute`

One queue carries all events to the thread that runs this generator; it admits and hands over, and never computes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from lox_stream import costs
from lox_stream.errors import Cancelled
from lox_stream.facts import TensorFacts
from lox_stream.matching import Step
from lox_stream.options import Options
from lox_stream.planning import memory_needed
from lox_stream.processing import Target, process
from lox_stream.reader import Prefetch
from lox_stream.workers import Workers

TICK_S = 0.1
WINDOW_BYTES = 2 << 30  # input that waits in the page cache, at most


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor whose last byte was written to its target."""

    step: Step
    facts: TensorFacts
    target: Target


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing new; the names in work. Lets a caller draw progress, and look for its own reasons to stop."""

    working: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    index: int
    finished: Finished


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Fetched:
    pass


def compute(
    steps: Sequence[Step],
    place: Callable[[Step], Target],
    options: Options,
    *,
    stop: threading.Event | None = None,
    in_order: bool = False,
    held_bytes: Callable[[Step], int] = lambda step: 0,
) -> Generator[Finished | Tick, None, None]:
    """Carry out the steps and yield each as it finishes, or `in_order`, with ticks in between.

    `place(step)` makes the target. `held_bytes(step)` is what the target keeps in memory until the caller asks for
    the event after it. Setting `stop` raises Cancelled at the next tile; closing the generator stops too. Our own
    buffers stay within `options.memory_bytes`, except that one step is always admitted.
    """
    threads = thread_count(options)
    events: queue.SimpleQueue[_Done | _Failed | _Fetched] = queue.SimpleQueue()
    admission = _Admission(steps, options, threads, held_bytes)
    parked: dict[int, Finished] = {}
    with Workers(threads, stop) as workers:
        window = min(WINDOW_BYTES, options.memory_bytes)
        reading = Prefetch(steps, window, lambda: events.put(_Fetched()), lambda error: events.put(_Failed(error)))
        try:
            following = 0
            while following < len(steps):
                for index in admission.admit():
                    workers.submit(_job(index, steps[index], place, options, workers, events))
                try:
                    event = events.get(timeout=TICK_S)
                except queue.Empty:
                    if stop is not None and stop.is_set():
                        raise Cancelled("stopped on request") from None
                    yield Tick(tuple(steps[index].name for index in admission.working - parked.keys()))
                    continue
                if isinstance(event, _Failed):
                    raise event.error
                if isinstance(event, _Fetched):
                    admission.fetched += 1
                    continue
                reading.release(event.finished.step)
                parked[event.index] = event.finished
                for index in [following] if in_order else [event.index]:
                    while index in parked:
                        yield parked.pop(index)
                        admission.release(index)
                        following += 1
                        index = following if in_order else -1
        except BaseException:
            workers.stop.set()
            raise
        finally:
            reading.close()


class _Admission:
    """Which steps may be in work: in order, when their bytes have been read, within the memory budget."""

    def __init__(
        self, steps: Sequence[Step], options: Options, threads: int, held_bytes: Callable[[Step], int]
    ) -> None:
        self.cost = [memory_needed(step, options) + held_bytes(step) for step in steps]
        self.budget = max(options.memory_bytes - costs.thread_bytes(threads), options.memory_bytes // 4)
        self.most = threads + 1
        self.working: set[int] = set()
        self.fetched = 0  # steps that were read
        self._next = 0
        self._held = 0

    def admit(self) -> Iterator[int]:
        while self._next < self.fetched and self._fits(self.cost[self._next]):
            self._held += self.cost[self._next]
            self.working.add(self._next)
            yield self._next
            self._next += 1

    def _fits(self, cost: int) -> bool:
        return not self.working or (len(self.working) < self.most and self._held + cost <= self.budget)

    def release(self, index: int) -> None:
        self.working.remove(index)
        self._held -= self.cost[index]


def _job(
    index: int,
    step: Step,
    place: Callable[[Step], Target],
    options: Options,
    workers: Workers,
    events: queue.SimpleQueue[_Done | _Failed | _Fetched],
) -> Callable[[], None]:
    def job() -> None:
        try:
            facts, target = process(step, lambda: place(step), options, workers.run)
        except BaseException as problem:  # raised where the events are read
            events.put(_Failed(problem))
        else:
            events.put(_Done(index, Finished(step, facts, target)))

    return job


def thread_count(options: Options) -> int:
    """Computing threads: as asked, or one for each core this process may use."""
    if options.threads:
        return options.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
