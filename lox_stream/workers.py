"""Threads that compute, and nobody else does: each at one torch thread, so that no sum depends on their number.

A job is a whole tensor and runs on one worker. Inside it, `run(task, count)` spreads a loop over all workers that
have no job: many small tensors are computed side by side, and one huge tensor gets every core.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TypeVar, cast

import torch

from lox_stream.errors import Cancelled

T = TypeVar("T")

_WAKE_S = 0.2  # an idle thread looks for the caller's event, which wakes nobody
_starting = threading.Lock()  # one default is changed and put back at a time


class _Group:
    """One loop: the next index to hand out, and how many tasks are still running."""

    def __init__(self, task: Callable[[int], None], count: int) -> None:
        self.task = task
        self.count = count
        self.next = 0
        self.running = 0
        self.error: BaseException | None = None


class Workers:
    """`count` computing threads; a context manager that joins them.

    The caller's own torch settings, and those of threads it starts later, stay as they are: torch keeps the thread
    count per thread plus one default for threads to come, and that default is put back from a thread of ours.
    When `asked`, the caller's event, or `stop` is set, every loop ends at its next task with `Cancelled`; the caller's
    is only read. Once it is set the threads end, too, whoever leaves the context or not.
    """

    def __init__(self, count: int, asked: threading.Event | None = None) -> None:
        self.stop = threading.Event()
        self._asked = asked or self.stop
        self._wake_s = None if asked is None else _WAKE_S
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._groups: list[_Group] = []
        self._closing = False
        self._failure: BaseException | None = None  # of a thread that could not begin
        self._threads = [threading.Thread(target=self._work, name=f"lox-{i}", daemon=True) for i in range(count)]

    def __enter__(self) -> Workers:
        default: list[int] = []
        self._ready = threading.Barrier(len(self._threads) + 1)
        with _starting:
            _in_thread(lambda: default.append(torch.get_num_threads()))
            try:
                self._start()
            finally:
                _in_thread(lambda: torch.set_num_threads(default[0]))
        return self

    def _start(self) -> None:
        """Start the threads and wait until each is ready; if one cannot be, the others end and its error is raised."""
        try:
            for thread in self._threads:
                thread.start()
            self._ready.wait()
        except (RuntimeError, MemoryError) as problem:  # no thread, or none that has memory (a broken barrier is one)
            self._ready.abort()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            raise self._failure or problem from None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.stop.set()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job, which must not raise; it runs on one worker."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def call(self, work: Callable[[], T]) -> T:
        """Do `work` as a job, and return what it returns or raise what it raises; not from inside a job."""
        return self.call_all([work])[0]

    def call_all(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """The same for several jobs, one on each worker at a time; once all have ended the first error is raised."""
        ends: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

        def job(index: int, work: Callable[[], T]) -> None:
            try:
                ends.put((index, work(), None))
            except BaseException as problem:
                ends.put((index, None, problem))

        for index, work in enumerate(works):
            self.submit(partial(job, index, work))
        ended = sorted((self._next(ends) for _ in works), key=lambda end: end[0])
        for _, _, problem in ended:
            if problem is not None:
                raise problem
        return [cast(T, value) for _, value, _ in ended]

    def _next(self, ends: queue.SimpleQueue[T]) -> T:
        """What comes out of a queue that jobs fill. Raises Cancelled where no thread is left for them."""
        while True:
            left = any(thread.is_alive() for thread in self._threads)  # before: the last one may fill it and end
            try:
                return ends.get(timeout=_WAKE_S)
            except queue.Empty:
                if not left:
                    raise Cancelled("stopped on request") from None

    def run(self, task: Callable[[int], None], count: int) -> None:
        """task(0), ..., task(count - 1) on this worker and all idle ones; returns when each is done.

        Only for use inside a job. Raises the first error of a task, or `Cancelled`.
        """
        if count == 1:
            self.check()
            task(0)
            return
        group = _Group(task, count)
        with self._changed:
            self._groups.append(group)
            self._changed.notify(count - 1)
        while self._advance(group):
            pass
        with self._changed:
            self._groups.remove(group)
            self._changed.wait_for(lambda: group.running == 0)
        error, group.error = group.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame, and would be held by it

    def _advance(self, group: _Group) -> bool:
        """Do the group's next task; False if there is none left or one of them failed."""
        with self._changed:
            try:
                self.check()
            except Cancelled as stopped:
                group.error = group.error or stopped
            if group.next >= group.count or group.error is not None:
                return False
            index = group.next
            group.next += 1
            group.running += 1
        error: BaseException | None = None
        try:
            group.task(index)
        except BaseException as problem:  # handed to the job that owns the loop
            error = problem
        with self._changed:
            group.running -= 1
            group.error = group.error or error
            if group.running == 0:
                self._changed.notify_all()
        return error is None

    def check(self) -> None:
        """Raise Cancelled if a stop was asked for."""
        if self.stop.is_set() or self._asked.is_set():
            raise Cancelled("stopped on request")

    def _open_group(self) -> _Group | None:
        return next((g for g in self._groups if g.next < g.count and g.error is None), None)

    def _has_news(self) -> bool:
        return bool(self._jobs or self._closing or self._asked.is_set() or self._open_group())

    def _work(self) -> None:
        try:
            _compute_alone()
            self._ready.wait()
        except threading.BrokenBarrierError:
            return
        except BaseException as problem:  # raised by who waits for us
            self._failure = problem
            self._ready.abort()
            return
        while True:
            with self._changed:
                while not self._changed.wait_for(self._has_news, self._wake_s):
                    pass
                job = self._jobs.popleft() if self._jobs else None
                group = None if job else self._open_group()
                if job is None and group is None:
                    return
            if job is not None:
                job()
            elif group is not None:
                self._advance(group)
            del job, group  # or an idle worker would keep the last tensor mapped


def _compute_alone() -> None:
    """Give this thread one torch thread, for good.

    A thread takes over torch's default at its first parallel operation, after whatever it was told before; so that
    operation is done here, while the default is one.
    """
    torch.set_num_threads(1)
    torch.zeros(1 << 17).exp_()


def _in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()
