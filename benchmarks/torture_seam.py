"""The calls that a running program makes to the operating system, below one folder: each goes through one function,
which may count, record, refuse or shorten it, or end the process.

Python's own calls are taken: of `os`, `io.open` and `mmap`. What the safetensors library (Rust) and torch (C++) call by
themselves is not seen: the one opens and maps a header while planning, the other reads what is mapped.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGING = (
    *("open", "write", "pwrite", "ftruncate", "posix_fallocate", "fchmod", "fsync", "fdatasync"),
    *("replace", "unlink", "mkdir", "close"),
)
READING = ("pread", "preadv", "read", "fstat", "stat", "listdir", "scandir", "mmap")
SHORTENED = ("write", "pwrite", "pread", "preadv", "read")
ERRORS = {  # which call can meet what, on Linux
    errno.EIO: (*CHANGING, *READING),
    errno.ENOSPC: ("open", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace", "mkdir"),
    errno.EDQUOT: (
        *("open", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace", "mkdir"),
        "close",  # of a network file system, which says there what it could not store
    ),
    errno.EACCES: ("open", "replace", "unlink", "mkdir", "stat", "listdir", "scandir", "fchmod"),
    errno.EROFS: ("open", "replace", "unlink", "mkdir", "fchmod"),
    errno.ENOMEM: ("open", "mmap", "listdir", "scandir", "stat", "fstat", "mkdir"),
    errno.EMFILE: ("open", "listdir", "scandir"),
    errno.EINTR: (),  # Python repeats such a call itself (PEP 475): a storm of signals tries that
}

Around = Callable[[str, tuple[Any, ...], Callable[..., Any]], Any]


class Seam:
    """While installed, `around(name, args, real)` stands for each call that concerns a path or a file below `roots`.

    Never taken out again: it is meant for a child that was forked.
    """

    def __init__(self, around: Around, *roots: Path) -> None:
        self._roots = tuple(os.path.realpath(root) + os.sep for root in roots)
        self._around = around

    def install(self) -> None:
        for name in (*CHANGING, *READING):
            if name not in ("read", "mmap") and hasattr(os, name):
                setattr(os, name, self._stand_in(name, getattr(os, name)))
        io.open = self._opener(io.open)  # type: ignore[misc]
        self._install_mmap()

    def _stand_in(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.concerns(args[0] if args else "."):
                return real(*args, **kwargs)
            return self._around(name, args, lambda *given: real(*given, **kwargs))

        return call

    def concerns(self, what: Any) -> bool:
        """Whether a path or a file descriptor lies below the folders; links count as what they lead to."""
        if isinstance(what, int):
            try:
                path = path_of(what)
            except OSError:
                return False
        else:
            path = os.path.normpath(Path.cwd() / os.fsdecode(what))
        return (path + os.sep).startswith(self._roots)

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        around, concerns = self._around, self.concerns

        class Raw(io.FileIO):
            """A file whose reads are taken too."""

            def readinto(self, buffer: Any) -> int:
                def read(fd: int, view: Any) -> int:
                    return super(Raw, self).readinto(view) or 0

                return int(around("read", (self.fileno(), memoryview(buffer).cast("B")), read))

            def read(self, size: int | None = -1) -> bytes:
                if size is None or size < 0:
                    return self.readall()
                buffer = bytearray(size)
                return bytes(buffer[: self.readinto(buffer)])

            def readall(self) -> bytes:
                pieces = []
                while piece := self.read(1 << 16):
                    pieces.append(piece)
                return b"".join(pieces)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
            if isinstance(file, int) or mode.strip("tb") != "r" or not concerns(file):
                return real(file, mode, buffering, *text, **more)
            raw = around("open", (file, os.O_RDONLY), lambda path, flags: Raw(path, "r"))
            if buffering == 0:
                return raw
            return io.BufferedReader(raw) if "b" in mode else io.TextIOWrapper(io.BufferedReader(raw), *text, **more)

        return opened

    def _install_mmap(self) -> None:
        real, around, concerns = mmap.mmap, self._around, self.concerns

        class Map(real):  # type: ignore[misc, valid-type]
            def __new__(cls, fileno: int, *args: Any, **kwargs: Any) -> Any:
                def make(fd: int, *given: Any) -> Any:
                    return real.__new__(cls, fd, *given, **kwargs)

                return around("mmap", (fileno, *args), make) if concerns(fileno) else make(fileno, *args)

        mmap.mmap = Map  # type: ignore[misc]


def path_of(fd: int) -> str:
    """The name under which an open file is known now; raises OSError."""
    return os.fspath(Path(f"/proc/self/fd/{fd}").readlink())


def changes(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call may change what is on the disk, or when it gets there."""
    return name in CHANGING and name != "close" and (name != "open" or bool(args[1] & (os.O_CREAT | os.O_TRUNC)))


class Counter:
    """Lets every call through and keeps the names of those that `counts(name, args)`."""

    def __init__(self, counts: Callable[[str, tuple[Any, ...]], bool] = lambda name, args: True) -> None:
        self._counts, self._lock = counts, threading.Lock()
        self.names: list[str] = []

    def number(self, name: str, args: tuple[Any, ...]) -> int:
        """Which one this is, from 0; -1 for one that is not counted."""
        if not self._counts(name, args):
            return -1
        with self._lock:
            self.names.append(name)
            return len(self.names) - 1

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        self.number(name, args)
        return real(*args)


class Killer(Counter):
    """Ends the process by SIGKILL at the `moment`-th call that changes the disk: before it, after it, or with half a
    write done."""

    def __init__(self, moment: int, how: str) -> None:
        super().__init__(changes)
        self._moment, self._how = moment, how

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        dies = self.number(name, args) == self._moment
        if dies and self._how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if dies and self._how == "half" and name in ("write", "pwrite"):
            args = (args[0], args[1][: len(args[1]) // 2], *args[2:])
        result = real(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class Fault(Counter):
    """The `moment`-th call fails with `code`; with `lasting` every later one that can meet this error does, too."""

    def __init__(self, moment: int, code: int, lasting: bool) -> None:
        super().__init__()
        self._moment, self._code, self._lasting = moment, code, lasting

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        number = self.number(name, args)
        again = self._lasting and number > self._moment and name in ERRORS[self._code]
        if number != self._moment and not again:
            return real(*args)
        if name == "close":
            real(*args)  # the file is closed whatever is said
        if name == "mmap" or isinstance(args[0], int):
            raise OSError(self._code, os.strerror(self._code))
        raise OSError(self._code, os.strerror(self._code), os.fspath(args[0]))


class Shortener(Counter):
    """Every read and write moves a random part of what it was asked for, at least one byte."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        self.number(name, args)
        if name in ("write", "pwrite", "read"):
            return real(args[0], memoryview(args[1])[: self._part(len(args[1]))], *args[2:])
        if name == "preadv":
            return real(args[0], [args[1][0][: self._part(len(args[1][0]))]], *args[2:])
        if name == "pread":
            return real(args[0], self._part(args[1]), *args[2:])
        return real(*args)

    def _part(self, whole: int) -> int:
        return self._rng.randint(1, whole) if whole > 1 and self._rng.random() < 0.5 else whole
