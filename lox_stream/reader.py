"""Reading: tensors as views of memory-mapped files, and a thread that fetches their pages ahead of the computation.

The mapped pages belong to the page cache, not to this process, and are given back after a tensor's last pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lox_stream import files
from lox_stream.c_library import c_function
from lox_stream.checkpoint import TensorInfo
from lox_stream.errors import Cancelled, DataError
from lox_stream.names import printable
from lox_stream.planning import Step
from lox_stream.regions import Region

READ_AGAIN = "Check the disk; what is finished is kept, go on with --resume"
_WAKE_S = 0.2
CHUNK_BYTES = 1 << 18  # stays in a core's cache, where the copy is not missed

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def matrix_at(data: memoryview, dtype: str, region: Region) -> Tensor:
    """The (m, n) matrix of a float tensor's bytes: a view where it lies in one piece, else a copy."""
    return matrix_of(torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]), region)


def matrix_of(flat: Tensor, region: Region) -> Tensor:
    """The same, out of the tensor's elements."""
    whole = flat[region.start : region.start + region.span]
    return grouped(whole, region).reshape(region.m, region.n)


def grouped(whole: Tensor, region: Region) -> Tensor:
    """A region's elements where they lie, (groups, elements of each), out of those of its whole, (span,)."""
    length = region.m * region.n // region.groups
    return whole.view(region.groups, -1)[:, region.first : region.first + length]


def read_floats(data: memoryview, info: TensorInfo) -> Tensor:
    """A tensor of floats over its bytes; nothing is copied."""
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype], count=prod(info.shape)).view(info.shape)


@contextmanager
def mapped(info: TensorInfo, *, again: bool = False) -> Iterator[memoryview]:
    """The tensor's bytes as a private map of its file. Raises DataError if the file is or gets shorter than it was.

    Afterwards the pages are given back to the page cache, and the page cache is told that nobody needs them; unless
    they are read `again`.
    """
    start = _page(info.start)
    with _open(info) as fd:
        _check_size(fd, info)
        access = mmap.PROT_READ | mmap.PROT_WRITE  # copy on write: torch warns of memory that cannot be written
        with files.explained(info.path, f"map {printable(info.name)}", READ_AGAIN, DataError):
            try:
                view = mmap.mmap(fd, info.start + info.n_bytes - start, mmap.MAP_PRIVATE, access, offset=start)
            except ValueError:  # cut since its size was looked at
                raise _cut(info, os.fstat(fd).st_size) from None
        try:
            yield memoryview(view)[info.start - start :]
            _check_size(fd, info)  # what was cut off within a page reads as zeros
        finally:
            if hasattr(os, "posix_fadvise"):  # which does nothing to pages that are still mapped and touched
                view.madvise(mmap.MADV_DONTNEED)
                if not again:
                    files.drop_cache(fd, start, info.start + info.n_bytes - start)


class Source(Protocol):
    """Brings the weights here that lie elsewhere: `scratch_disk.Scratch`."""

    @property
    def warnings(self) -> list[str]: ...  # complete messages
    def room_for(self, jobs: Sequence[Sequence[Step]]) -> None: ...
    def expect(self, jobs: Sequence[Sequence[Step]]) -> None: ...
    def need(self, job: Sequence[Step], closed: Callable[[], bool]) -> None: ...
    def done(self, job: Sequence[Step]) -> None: ...


class Prefetch:
    """Reads the bytes of the jobs to come into the page cache, base and aligned side by side, in order.

    What lies there already is left alone: to read it again would cost a copy.

    At most `window_bytes` are fetched and not yet released; a larger job is fetched alone. After each job `fetched()`
    is called, or once `failed(error)`; both from a thread of this class. A `source` is waited for before each job.
    Setting `stop` ends the thread, as `close` does.
    """

    def __init__(
        self,
        jobs: Sequence[Sequence[Step]],
        window_bytes: int,
        fetched: Callable[[], None],
        failed: Callable[[BaseException], None],
        source: Source | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._jobs, self._source, self._stop = jobs, source, stop
        self._window = window_bytes
        self._fetched, self._failed = fetched, failed
        self._changed = threading.Condition()
        self._held = 0
        self._closed = False
        self._thread = threading.Thread(target=self._fetch_jobs, name="lox-read", daemon=True)
        self._thread.start()

    def release(self, job: Sequence[Step]) -> None:
        """The job's last pass is over: its bytes leave the window."""
        if self._source is not None:
            self._source.done(job)
        with self._changed:
            self._held -= read_bytes(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading and join the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _fetch_jobs(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="lox-read") as sides:
            try:
                for job in self._jobs:
                    self._admit(read_bytes(job))
                    if self._source is not None:
                        self._source.need(job, self._is_over)
                    other = sides.submit(self._fetch_all, [info for step in job for info in others_of(step)])
                    self._fetch_all([step.aligned for step in job])
                    other.result()
                    self._fetched()
            except BaseException as problem:  # handed to whoever waits for the step
                self._failed(problem)

    def _admit(self, n_bytes: int) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._is_over() or self._has_room(n_bytes), _WAKE_S):
                pass  # setting `stop` wakes nobody
            if self._is_over():
                raise Cancelled("stopped on request")
            self._held += n_bytes

    def _has_room(self, n_bytes: int) -> bool:
        return self._held == 0 or self._held + n_bytes <= self._window

    def _is_over(self) -> bool:
        return self._closed or (self._stop is not None and self._stop.is_set())

    def _fetch_all(self, infos: Sequence[TensorInfo]) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for info in infos:
            self._fetch(info, buffer)

    def _fetch(self, info: TensorInfo, buffer: memoryview) -> None:
        with _open(info) as fd:
            _check_size(fd, info)
            done = info.n_bytes if _resident(fd, info) else 0
            while done < info.n_bytes:
                if self._is_over():
                    raise Cancelled("stopped on request")
                want = min(len(buffer), info.n_bytes - done)
                with files.explained(info.path, _reading(info, info.start + done), READ_AGAIN, DataError):
                    got = os.preadv(fd, [buffer[:want]], info.start + done)
                if got == 0:
                    raise _cut(info, info.start + done)
                done += got


def others_of(step: Step) -> list[TensorInfo]:
    """What a step reads beside aligned's tensor."""
    return [*([step.base] if step.base else []), *(info for _, info in step.blend)]


def read_bytes(steps: Sequence[Step]) -> int:
    """Bytes of input that steps read, of all sides."""
    return sum(info.n_bytes for step in steps for info in (step.aligned, *others_of(step)))


def _resident(fd: int, info: TensorInfo) -> bool:
    """Whether the page cache holds all of the tensor already; False where the system does not tell."""
    mincore = c_function("mincore")
    if mincore is None or info.n_bytes == 0:
        return False
    start = _page(info.start)
    size = info.start + info.n_bytes - start
    states = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
    try:
        with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start) as view:
            first = ctypes.c_ubyte.from_buffer(view)
            failed = mincore(ctypes.byref(first), ctypes.c_size_t(size), ctypes.c_void_p(states.ctypes.data))
            del first  # or the map could not be closed
    except (OSError, ValueError):  # the map that the work needs will say it
        return False
    return not failed and bool((states & 1).all())


def _page(offset: int) -> int:
    """The last offset before this one at which a map may begin."""
    return offset - offset % mmap.ALLOCATIONGRANULARITY


@contextmanager
def _open(info: TensorInfo) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        with files.explained(info.path, "open it any more", "Put it back and go on with --resume", DataError):
            fd = stack.enter_context(files.opened(info.path))
        yield fd


def _reading(info: TensorInfo, at: int) -> str:
    return f"read {printable(info.name)} at byte {at}"


def _check_size(fd: int, info: TensorInfo) -> None:
    with files.explained(info.path, _reading(info, info.start), READ_AGAIN, DataError):
        size = os.fstat(fd).st_size
    if size < info.start + info.n_bytes:
        raise _cut(info, size)


def _cut(info: TensorInfo, size: int) -> DataError:
    return DataError(
        f"{printable(info.name)}: {printable(info.path)} is {size} bytes long, and this tensor ends at byte "
        f"{info.start + info.n_bytes}: the file was cut while it was in use. Restore it and go on with --resume"
    )
