"""The computing threads: every core on one loop, errors and stops, and the caller's torch left alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from lox_stream import workers
from lox_stream.errors import Cancelled
from lox_stream.workers import Workers


def finished(workers, job):
    """Run one job and return what it returned or raised."""
    outcome, done = [], threading.Event()

    def wrapped():
        try:
            outcome.append(job())
        except BaseException as problem:
            outcome.append(problem)
        done.set()

    workers.submit(wrapped)
    assert done.wait(60)
    return outcome[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_task_of_a_loop_runs_once(threads):
    counts = [0] * 100

    def task(i):
        counts[i] += 1

    with Workers(threads) as workers:
        assert finished(workers, lambda: workers.run(task, 100)) is None
    assert counts == [1] * 100


def test_idle_workers_help_with_one_loop():
    """Three tasks that wait for each other only end if three threads run them."""
    meeting = threading.Barrier(3, timeout=60)
    with Workers(3) as workers:
        assert finished(workers, lambda: workers.run(lambda i: meeting.wait(), 3)) is None


def test_jobs_run_side_by_side():
    meeting = threading.Barrier(2, timeout=60)
    with Workers(2) as workers:
        done = [threading.Event(), threading.Event()]
        for event in done:
            workers.submit(lambda event=event: (meeting.wait(), event.set()))
        assert all(event.wait(60) for event in done)


def test_an_error_in_a_task_is_raised_where_the_loop_was_started():
    def task(i):
        if i == 3:
            raise ValueError("three")

    with Workers(2) as workers:
        assert isinstance(finished(workers, lambda: workers.run(task, 10)), ValueError)
        assert finished(workers, lambda: workers.run(lambda i: None, 10)) is None


def test_a_stop_ends_a_loop_at_its_next_task():
    stop = threading.Event()
    ran = []

    def task(i):
        ran.append(i)
        stop.set()

    with Workers(1, stop) as workers:
        assert isinstance(finished(workers, lambda: workers.run(task, 1000)), Cancelled)
    assert ran == [0]


def test_a_call_gives_back_what_the_work_returns_or_raises():
    stop = threading.Event()
    with Workers(2, stop) as workers:
        assert workers.call(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            workers.call(lambda: 1 // 0)
        workers.call(workers.check)
        stop.set()
        with pytest.raises(Cancelled):
            workers.call(workers.check)


def test_the_callers_event_ends_the_threads_and_calls_do_not_wait_for_them():
    stop = threading.Event()
    with Workers(2, stop) as workers:
        stop.set()
        for thread in workers._threads:
            thread.join(60)
            assert not thread.is_alive()
        with pytest.raises(Cancelled):
            workers.call(lambda: 3)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_arithmetic_in_a_worker_starts_no_thread_of_torch():
    """Which `torch.get_num_threads()` cannot tell: it reports the default for threads to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        a, new = torch.randn(600, 600), []

        def task(i):
            before = {path.name for path in Path("/proc/self/task").iterdir()}
            (a @ a).exp().sum()
            torch.linalg.svd(a[:100, :100])
            new.extend({path.name for path in Path("/proc/self/task").iterdir()} - before)

        with Workers(1) as workers:
            assert finished(workers, lambda: workers.run(task, 1)) is None
        assert not new
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setting", [1, 2, 3])
def test_the_caller_keeps_its_torch_settings_and_so_do_its_later_threads(setting):
    before = torch.get_num_threads()
    torch.set_num_threads(setting)
    try:
        inside = []
        with Workers(2) as workers:
            finished(workers, lambda: workers.run(lambda i: None, 4))
            inside.append(torch.get_num_threads())
            later = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
            later.start()
            later.join()
        after = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
        after.start()
        after.join()
        assert [*inside, torch.get_num_threads()] == [setting] * 4
    finally:
        torch.set_num_threads(before)


def test_no_thread_is_left_behind():
    with Workers(4) as workers:
        finished(workers, lambda: workers.run(lambda i: None, 4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lox-")]


def test_an_idle_worker_holds_nothing_of_the_last_job():
    class Thing:
        pass

    import gc
    import weakref

    thing = Thing()
    alive = weakref.ref(thing)
    with Workers(2) as workers:
        finished(workers, lambda thing=thing: workers.run(lambda i: thing, 4))
        del thing
        deadline = time.monotonic() + 30
        while alive() is not None and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert alive() is None


def test_workers_that_start_together_leave_the_default_alone():
    before = torch.get_num_threads()

    def use():
        for _ in range(5):
            with Workers(2):
                pass

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [before]


@pytest.mark.parametrize("fails", ["_compute_alone", "threading.Thread.start"])
def test_a_thread_that_cannot_begin_is_an_error_and_no_endless_wait(monkeypatch, fails):
    real, calls = (
        {"_compute_alone": workers._compute_alone, "threading.Thread.start": threading.Thread.start}[fails],
        [],
    )

    def second_fails(*args):
        calls.append(args)
        if len(calls) == (2 if fails == "_compute_alone" else 3):  # one reads torch's default first
            raise RuntimeError("can't start new thread")
        return real(*args)

    monkeypatch.setattr(f"lox_stream.workers.{fails}", second_fails)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"), Workers(3):
        pass
    monkeypatch.undo()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lox-")]
    assert torch.get_num_threads() == before
