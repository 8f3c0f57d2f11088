"""What Ctrl-C (SIGINT) and SIGTERM do to a command: at once where nothing can be lost, else first gently.

And what SIGBUS does, which the system sends where a mapped file was cut while it was read: it is said, which would be
too late for an exception.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from lox_stream.c_library import c_function
from lox_stream.names import printable

NUMBERS = (signal.SIGINT, signal.SIGTERM)
BUS_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
PATIENCE_S = 1.6  # a gentle stop that takes longer is cut off: the state is then that of a killed run


class Interruption:
    """A context manager that handles the signals, from the main thread; elsewhere it does nothing.

    A signal ends the process at once, with exit code 128 + its number, except `gently`: there the first one sets
    `cancel` and is remembered in `number`, and only a second one ends the process, or PATIENCE_S gone by.
    `last_words` makes the text that an end at once leaves on stderr. SIGBUS ends it with exit code 1, naming the file.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self.cancel = threading.Event()
        self.number: int | None = None
        self._last_words = last_words
        self._gentle = False
        self._timer: threading.Timer | None = None
        self._before: dict[int, object] = {}
        self._speaks = threading.Lock()
        self._on_bus_error = BUS_HANDLER(self._cut)  # referred to as long as the system may call it

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and scripts' background jobs want it
                    self._before[number] = signal.signal(number, self._handle)
            install = c_function("signal")
            if install is not None and signal.getsignal(signal.SIGBUS) is signal.SIG_DFL:
                self._before[signal.SIGBUS] = signal.SIG_DFL
                install(ctypes.c_int(signal.SIGBUS), self._on_bus_error)  # Python's own would only take a note of it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def gently(self) -> Iterator[None]:
        """While this lasts the first signal only asks for the end."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False
            if self._timer is not None:
                self._timer.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None or not self._gentle:
            self.leave(number)
        self.number = number
        self.cancel.set()
        self._timer = threading.Timer(PATIENCE_S, self.leave, (number,))
        self._timer.daemon = True
        self._timer.start()

    def leave(self, number: int) -> NoReturn:
        """End the process now, whatever its threads do."""
        self._end(128 + number)

    def _end(self, code: int, said: str = "") -> NoReturn:
        """A progress bar may have hidden the cursor."""
        try:
            cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
            os.write(2, f"{cursor}{said}{self._last_words()}\n".encode(errors="backslashreplace"))
        finally:
            os._exit(code)

    def _cut(self, number: int) -> None:
        """In the thread that met the end of a file; if it returned, it would meet it again. Of several one speaks."""
        try:
            if not self._speaks.acquire(blocking=False):
                time.sleep(PATIENCE_S)
                return
            files = ", ".join(cut_files()) or "a file"
            self._end(1, f"error: {files}: was cut while it was read. Restore it, and run again\n")
        finally:
            os._exit(1)


def cut_files() -> list[str]:
    """The files that this process has mapped beyond their ends, as /proc tells; [] where there is none.

    Libraries are mapped so by the system itself.
    """
    found = []
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            places, _, offset, _, inode, *path = line.split(maxsplit=5)
            start, end = (int(place, 16) for place in places.split("-"))
            if inode != "0" and path and ".so" not in path[0] and Path(path[0]).is_file():
                pages = -(-Path(path[0]).stat().st_size // mmap.PAGESIZE)
                if int(offset, 16) + end - start > pages * mmap.PAGESIZE:
                    found.append(printable(path[0]))
    except OSError:
        return []
    return sorted(set(found))
