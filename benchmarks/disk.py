"""The disk's side of an end-to-end time: a program watched from outside, and the least that its files alone cost."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pairs import warm

from lox_stream import files

CALL_BYTES = 4 << 20
BEHIND_BYTES = 32 << 20  # written before the disk is told to begin with it
SAMPLE_S = 0.02
BLOCK = 512  # of ru_inblock


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished program: what it took, as the kernel counted it."""

    code: int
    elapsed_s: float
    cpu_s: float
    peak_anon_bytes: int  # largest RssAnon seen; 0 where /proc does not tell
    read_bytes: int  # from the disk, not from the page cache


def watched(command: Sequence[str]) -> Ran:
    """Run a program to its end and look at its anonymous memory every 20 ms."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ended = threading.Event()
    peak = [0]
    sampler = threading.Thread(target=_sample, args=(process.pid, ended, peak))
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    finally:
        ended.set()
    elapsed_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ran(process.returncode, elapsed_s, cpu_s, peak[0], usage.ru_inblock * BLOCK)


def _sample(pid: int, ended: threading.Event, peak: list[int]) -> None:
    path = Path(f"/proc/{pid}/status")
    while not ended.wait(SAMPLE_S):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            return
        kib = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:")), 0)
        peak[0] = max(peak[0], kib << 10)


def busy_s(folder: Path) -> float | None:
    """Seconds since boot in which the disk under a folder had work; None where Linux does not tell, as of a tmpfs."""
    number = folder.stat().st_dev
    try:
        lines = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    except OSError:
        return None
    named = [str(os.major(number)), str(os.minor(number))]
    return next((int(words[12]) / 1000 for words in lines if words[:2] == named), None)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes, a block in memory at a time."""
    with one.open("rb") as left, other.open("rb") as right:
        blocks = iter(lambda: (left.read(CALL_BYTES), right.read(CALL_BYTES)), (b"", b""))
        return all(a == b for a, b in blocks)


def floor(sides: Sequence[Sequence[Path]], out: Path) -> int:
    """The same life of files as a run's, with nothing computed; returns the bytes that came from the disk.

    Every input is read once, each side by a thread of its own. At the same time fresh files of the last side's sizes
    are reserved in `out`, written, written back as they grow, synced, renamed, and the folder is synced.
    """
    out.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    block = os.urandom(CALL_BYTES)
    with ThreadPoolExecutor(len(sides) + 1) as threads:
        works = [threads.submit(warm, side) for side in sides]
        works.append(threads.submit(_write, [(out / path.name, path.stat().st_size) for path in sides[-1]], block))
        for work in works:
            work.result()
    files.sync_folder(out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before) * BLOCK


def _write(targets: Sequence[tuple[Path, int]], block: bytes) -> None:
    """As the program does it: all space first, then the bytes; the sync comes when there is nothing left to write."""
    fds = []
    for path, size in targets:
        fd = os.open(files.partial(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        files.reserve(fd, size)
        fds.append(fd)
    for fd, (_, size) in zip(fds, targets, strict=True):
        for start in range(0, size, BEHIND_BYTES):
            end = min(start + BEHIND_BYTES, size)
            for at in range(start, end, len(block)):
                files.write_at(fd, memoryview(block)[: end - at], at)
            files.start_writing_back(fd, start, end - start)
    for fd, (path, _) in zip(fds, targets, strict=True):
        os.fsync(fd)
        os.close(fd)
        files.partial(path).rename(path)
