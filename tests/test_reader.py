"""Reading ahead and giving back: windows, errors, and the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from lox_stream import reader
from lox_stream.checkpoint import open_checkpoint
from lox_stream.errors import Cancelled, DataError
from lox_stream.matching import Step
from lox_stream.reader import Prefetch, mapped

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux page cache")


@pytest.fixture
def steps(tmp_path):
    save_file({f"t{i}": torch.full((1000,), float(i)) for i in range(5)}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path / "model.safetensors").tensors
    return [Step(name, info, None, "copy", "skipped") for name, info in sorted(tensors.items())]


class Log:
    def __init__(self):
        self.fetched = 0
        self.error = None
        self.changed = threading.Condition()

    def on_fetched(self):
        with self.changed:
            self.fetched += 1
            self.changed.notify_all()

    def on_failed(self, error):
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def wait(self, law):
        with self.changed:
            assert self.changed.wait_for(law, 60)


def resident(path):
    """Pages of a file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as view:
        pages = -(-size // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) == 0
        return sum(state & 1 for state in states)


def test_a_map_shows_the_tensors_bytes_wherever_they_start(steps):
    for i, step in enumerate(steps):
        with mapped(step.aligned) as data:
            assert torch.frombuffer(data, dtype=torch.float32, count=1000).tolist() == [float(i)] * 1000


def test_reading_ahead_stops_at_the_window(steps):
    log = Log()
    reading = Prefetch([[step] for step in steps], 2 * 4000, log.on_fetched, log.on_failed)
    log.wait(lambda: log.fetched == 2)
    reading.release([steps[0]])
    log.wait(lambda: log.fetched == 3)
    reading.close()
    assert log.fetched == 3


def test_a_tensor_larger_than_the_window_is_read_alone(steps):
    log = Log()
    reading = Prefetch([[step] for step in steps], 10, log.on_fetched, log.on_failed)
    for i, step in enumerate(steps):
        log.wait(lambda i=i: log.fetched == i + 1)
        reading.release([step])
    reading.close()
    assert log.error is None


def test_a_job_of_several_tensors_is_fetched_and_released_as_one(steps):
    log = Log()
    reading = Prefetch([steps[:2], steps[2:3]], 2 * 4000, log.on_fetched, log.on_failed)
    log.wait(lambda: log.fetched == 1)
    reading.release(steps[:2])
    log.wait(lambda: log.fetched == 2)
    reading.close()
    assert log.error is None


def test_closing_ends_a_reader_that_waits_for_room(steps):
    log = Log()
    reading = Prefetch([[step] for step in steps], 10, log.on_fetched, log.on_failed)
    log.wait(lambda: log.fetched == 1)
    reading.close()
    assert isinstance(log.error, Cancelled)


def test_the_callers_event_ends_a_reader_that_waits_for_room(steps):
    """With nobody there to close it, or to release what it has read."""
    log, stop = Log(), threading.Event()
    reading = Prefetch([[step] for step in steps], 10, log.on_fetched, log.on_failed, stop=stop)
    log.wait(lambda: log.fetched == 1)
    stop.set()
    log.wait(lambda: isinstance(log.error, Cancelled))
    reading.close()


def test_a_file_that_was_cut_is_an_error_that_tells_both_sizes(steps):
    path = steps[0].aligned.path
    os.truncate(path, path.stat().st_size - 100)
    log = Log()
    reading = Prefetch([[step] for step in steps], 1 << 20, log.on_fetched, log.on_failed)
    log.wait(lambda: log.error is not None)
    reading.close()
    assert isinstance(log.error, DataError)
    assert str(path.stat().st_size) in str(log.error)
    cut = max(steps, key=lambda step: step.aligned.start)
    with pytest.raises(DataError, match="was cut"), mapped(cut.aligned):
        pass


def test_a_file_that_is_gone_is_an_error(steps):
    steps[0].aligned.path.unlink()
    with pytest.raises(DataError, match="cannot open it any more"), mapped(steps[0].aligned):
        pass


def test_an_error_of_the_disk_names_tensor_file_and_byte(steps, monkeypatch):
    def preadv(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader, "_resident", lambda *args: False)
    log = Log()
    reading = Prefetch([[step] for step in steps], 1 << 20, log.on_fetched, log.on_failed)
    log.wait(lambda: log.error is not None)
    reading.close()
    assert isinstance(log.error, DataError)
    assert "t0" in str(log.error)
    assert "--resume" in str(log.error)


@linux
def test_what_the_page_cache_holds_is_not_read_again(steps, monkeypatch):
    for step in steps:
        step.aligned.path.read_bytes()
    monkeypatch.setattr(os, "preadv", lambda *args: pytest.fail("read again"))
    log = Log()
    reading = Prefetch([[step] for step in steps], 1 << 20, log.on_fetched, log.on_failed)
    log.wait(lambda: log.fetched == len(steps))
    reading.close()
    assert log.error is None


@linux
def test_the_page_cache_is_given_back_after_the_last_pass(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4 << 20)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    info = open_checkpoint(path).tensors["w"]
    path.read_bytes()
    pages = resident(path)
    if pages < 4000:
        pytest.skip("this file system does not keep its files in the page cache")
    with mapped(info) as data:
        assert float(torch.frombuffer(data, dtype=torch.float32, count=4 << 20).sum()) == 0.0
    assert resident(path) < pages // 10


@linux
@pytest.mark.parametrize(("call", "said"), [("os.fstat", "cannot read"), ("mmap.mmap", "cannot map")])
def test_whatever_the_system_refuses_while_reading_names_tensor_and_file(steps, monkeypatch, call, said):
    def fails(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:  # pytest asks for the status of files, too
        patch.setattr(call, fails)
        with pytest.raises(DataError) as raised, mapped(steps[0].aligned):
            pass
    assert f"model.safetensors: {said} t0" in str(raised.value)
    assert "Cannot allocate memory. Use a smaller --memory" in str(raised.value)


@linux
def test_a_page_cache_that_does_not_tell_is_read_anyway(steps, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fails)
    log = Log()
    reading = Prefetch([[step] for step in steps], 1 << 20, log.on_fetched, log.on_failed)
    log.wait(lambda: log.fetched == len(steps))
    reading.close()
    assert log.error is None
