"""File calls that survive a crash: space reserved first, bytes synced, names replaced, one writer a folder.

What Linux has and macOS lacks (`posix_fallocate`, `fdatasync`, `posix_fadvise`) is left out there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from lox_stream.c_library import c_function
from lox_stream.errors import LoxError, OutputError
from lox_stream.names import printable
from lox_stream.output_rules import PARTIAL

GO_ON = "The work so far is kept: the same command with --resume goes on."
CALL_BYTES = 1 << 30  # one write moves at most 2 GiB - 4 KiB on Linux; macOS refuses 2 GiB and more
COPY_BYTES = 1 << 20
NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
MORE_MEMORY = "Use a smaller --memory or fewer --threads, or raise what this process may map (ulimit -v). "
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def partial(path: Path) -> Path:
    """The name that `path` has while it is written."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def explained(path: Path, doing: str, way_out: str, kind: type[LoxError] = OutputError) -> Iterator[None]:
    """Turn what the operating system says into an error of ours: `path`: cannot `doing`, why, `way_out`."""
    try:
        yield
    except OSError as error:
        first = "Free some space. " if error.errno in FULL else MORE_MEMORY if error.errno == errno.ENOMEM else ""
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        at = f" ({printable(named)})" if named != path else ""
        raise kind(f"{printable(path)}: cannot {doing}: {error.strerror or error}{at}. {first}{way_out}") from error


def reserve(fd: int, n_bytes: int) -> None:
    """Make the file exactly n_bytes long and claim its blocks, keeping what it holds.

    A full disk or a limit raises here (ENOSPC, EDQUOT, EFBIG). Where nothing can be claimed the file is sparse.
    """
    os.ftruncate(fd, n_bytes)
    if n_bytes == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` where the file stands, in as many calls as the system needs."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:CALL_BYTES]) :]


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (a view of bytes) at `offset`, in as many calls as the system needs."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + CALL_BYTES], offset + done)


def read_pieces(fd: int, start: int, n_bytes: int) -> Iterator[bytes]:
    """The bytes [start, start + n_bytes) in pieces of 1 MiB; fewer where the file ends before."""
    end = start + n_bytes
    while start < end:
        piece = os.pread(fd, min(COPY_BYTES, end - start), start)
        if not piece:
            return
        yield piece
        start += len(piece)


def checksum_of(fd: int, start: int, n_bytes: int) -> str:
    """xxh3_128 of the bytes [start, start + n_bytes), hexadecimal."""
    digest = xxhash.xxh3_128()
    for piece in read_pieces(fd, start, n_bytes):
        digest.update(piece)
    return digest.hexdigest()


def sync_data(fd: int) -> None:
    """Wait until the file's bytes are on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with opened(path) as fd:
        os.fsync(fd)


def start_writing_back(fd: int, start: int, n_bytes: int) -> None:
    """Let the disk begin with these bytes and do not wait; a hint, nothing where the system has no such call.

    Without it the last `fdatasync` of 1.5 GiB took 0.5 s after the work was done, with it 0.02 s (2 cores, ext4).
    """
    call = c_function("sync_file_range")
    if call is not None and n_bytes > 0:
        call(fd, ctypes.c_int64(start), ctypes.c_int64(n_bytes), ctypes.c_uint(2))  # 2: SYNC_FILE_RANGE_WRITE


def drop_cache(fd: int, start: int = 0, n_bytes: int = 0) -> None:
    """Give the page cache of synced bytes back (n_bytes 0: to the end); a hint, silent where there is none."""
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(fd, start, n_bytes, os.POSIX_FADV_DONTNEED)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, each name synced."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor, closed afterwards."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        close(fd)


def close(fd: int) -> None:
    """Close a file. Silent: what was not written was said when it was synced, and what was read was read."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A new file to write to, which is synced and becomes `path` on success. The folder is for the caller to sync."""
    with opened(partial(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        yield fd
        os.fsync(fd)
    partial(path).replace(path)


def forget(path: Path) -> None:
    """Remove a file that was begun in vain. Silent: what went wrong is told by the error before."""
    with contextlib.suppress(OSError):
        path.unlink()


def is_own(path: Path) -> bool:
    """Whether a file may be written in place: no link, and under no second name, as a copy by `cp -l` would be."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def replace_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or what it held before. The folder is for the caller to sync."""
    with replacing(path) as fd:
        write_all(fd, data)


def copy_file(source: Path, target: Path) -> str:
    """Copy the content of `source` (links followed) as `replace_file` writes; keeps that it may be executed.

    Returns the xxh3_128 of what was copied, hexadecimal.
    """
    digest = xxhash.xxh3_128()
    with opened(source) as file, replacing(target) as copy:
        for piece in read_pieces(file, 0, os.fstat(file).st_size):
            write_all(copy, piece)
            digest.update(piece)
        mode = os.fstat(copy).st_mode
        if os.fstat(file).st_mode & 0o111:
            os.fchmod(copy, mode | (mode & 0o444) >> 2)
    return digest.hexdigest()


def lock_folder(path: Path) -> tuple[int, bool]:
    """Open a folder and take its lock: (the file descriptor that holds it, whether this file system has locks).

    Raises BlockingIOError where another descriptor holds it. The lock ends with the descriptor, so a killed
    process leaves none behind.
    """
    import fcntl  # not on Windows, where this module has to be importable to say so

    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # NFS refuses a descriptor that is not open for writing, and a folder cannot be
        return fd, False
    return fd, True
