"""What this machine has for lox-stream, what is missing, and how to get it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lox_stream import files
from lox_stream.device import driver, missing, without_triton
from lox_stream.errors import OutputError
from lox_stream.installed import Finding, extras

TRIED_BYTES = 256 << 20
PIECE_BYTES = 8 << 20
SLOW = 200e6  # bytes a second of a disk, below which it is all that a run waits for


def findings(folder: Path) -> Iterator[Finding]:
    """What there is beside packages; `folder` is where outputs would be written. Takes some seconds for the disk.

    Writes a file of 256 MiB into `folder`, and removes it. Raises OutputError where that cannot be.
    """
    yield _cores()
    yield _memory()
    yield from _gpu()
    yield from extras()
    yield from _disk(folder)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    vectors = torch.backends.cpu.get_cpu_capability()
    slow = vectors == "DEFAULT"
    way_out = "Without AVX2 the CPU computes several times slower" if slow else ""
    return Finding("cores", "note" if slow else "ok", f"{count} that this process may use, {vectors}", way_out)


def _memory() -> Finding:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        free_bytes = int(line.split()[1]) << 10
        little = free_bytes < 6 << 30
        way_out = "Less than the default budget of 4 GiB and the program itself: give --memory 1GiB" if little else ""
        return Finding("memory", "note" if little else "ok", f"{free_bytes / (1 << 30):.1f} GiB free", way_out)
    return Finding("memory", "note", "cannot be told here")


def _gpu() -> Iterator[Finding]:
    """Each GPU, and whether Triton compiles for it."""
    problem = missing("cuda")
    if problem:
        way_out = "Runs compute on the CPU. With a GPU: install NVIDIA's driver and a CUDA build of torch"
        yield Finding("GPU", "note", f"{problem} ({driver()})" if "driver" not in problem else problem, way_out)
        return
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        memory = f"{free_bytes / (1 << 30):.1f} of {total_bytes / (1 << 30):.1f} GiB free"
        yield Finding(f"GPU {index}", "ok", f"{torch.cuda.get_device_name(index)}, {memory}, {driver()}")
        broken = without_triton(index)
        way_out = "Or compute with the kernels of torch, which are slower: --kernels torch" if broken else ""
        yield Finding(f"Triton on GPU {index}", "note" if broken else "ok", broken or "compiles", way_out)


def _disk(folder: Path) -> Iterator[Finding]:
    """Free space, locks, and how fast a file is written, synced and read again from the disk."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: is no folder, expected one that exists, where outputs would be written")
    with files.explained(folder, "look at the folder", "Give a folder that exists: lox-stream doctor DIR"):
        free_bytes = shutil.disk_usage(folder).free
        yield Finding("free space", "ok", f"{free_bytes / 1e9:.1f} GB in {folder}")
        yield _locks(folder)
    if free_bytes < 2 * TRIED_BYTES:
        yield Finding("disk", "note", "too little space to try it")
        return
    written, read = _rates(folder)
    slow = min(written, read) < SLOW
    yield Finding(
        "disk",
        "note" if slow else "ok",
        f"writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s",
        "A run reads both models and writes one: it will wait for this disk" if slow else "",
    )


def _locks(folder: Path) -> Finding:
    try:
        fd, locked = files.lock_folder(folder)
    except BlockingIOError:
        return Finding("locks", "note", "a run is writing here", "Wait for it, or choose another folder")
    os.close(fd)
    if locked:
        return Finding("locks", "ok", "work")
    return Finding("locks", "note", "are not known to this file system", "Let only one run write to a folder here")


def _rates(folder: Path) -> tuple[float, float]:
    """Bytes a second, written and synced, and read past the page cache where the system lets us."""
    piece = memoryview(os.urandom(PIECE_BYTES))
    with (
        files.explained(
            folder, "write a file to try the disk", "Give a folder that can be written: lox-stream doctor DIR"
        ),
        tempfile.NamedTemporaryFile(dir=folder, prefix=".lox-stream-doctor-") as file,
    ):
        fd = file.fileno()
        started = time.perf_counter()
        for at in range(0, TRIED_BYTES, PIECE_BYTES):
            files.write_at(fd, piece, at)
        os.fsync(fd)
        written_s = time.perf_counter() - started
        files.drop_cache(fd)
        started = time.perf_counter()
        for _ in files.read_pieces(fd, 0, TRIED_BYTES):
            pass
        read_s = time.perf_counter() - started
    return TRIED_BYTES / written_s, TRIED_BYTES / read_s
