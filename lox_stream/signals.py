"""What Ctrl-C (SIGINT) and SIGTERM do to a command: at once where nothing can be lost, else first gently."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, Self

NUMBERS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 1.6  # a gentle stop that takes longer is cut off: the state is then that of a killed run


class Interruption:
    """A context manager that handles both signals, from the main thread; elsewhere it does nothing.

    A signal ends the process at once, with exit code 128 + its number, except `gently`: there the first one sets
    `cancel` and is remembered in `number`, and only a second one ends the process, or PATIENCE_S gone by.
    `last_words` makes the text that an end at once leaves on stderr.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self.cancel = threading.Event()
        self.number: int | None = None
        self._last_words = last_words
        self._gentle = False
        self._timer: threading.Timer | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and scripts' background jobs want it
                    self._before[number] = signal.signal(number, self._handle)
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
        """End the process now, whatever its threads do; a progress bar may have hidden the cursor."""
        try:
            cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
            os.write(2, f"{cursor}{self._last_words()}\n".encode(errors="backslashreplace"))
        finally:
            os._exit(128 + number)
