"""How far work of several stages is, each as long as a model's bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from lox_stream.api import Progress

Show = Callable[[Progress], None]


class Track:
    """Calls the caller's `progress` with the bytes of all stages."""

    def __init__(self, stage_bytes: int, progress: Show | None) -> None:
        self._size, self._progress, self._started = stage_bytes, progress, time.monotonic()
        self._stages = self._done = self._resumed = 0

    def begin(self, stages: int, finished: int = 0) -> None:
        """Of so many stages earlier sessions have finished some."""
        self._stages, self._done, self._resumed = stages, finished, finished

    @contextmanager
    def stage(self, label: str) -> Iterator[Show]:
        """While it lasts, what shows how far it is itself."""

        def show(at: Progress) -> None:
            self._tell(label, at.done_bytes / at.total_bytes if at.total_bytes else 1.0, at)

        yield show
        self._done += 1

    def say(self, label: str) -> None:
        """That a stage is at its end, but for this."""
        self._tell(label, 1.0, Progress(0, 0, 0, 0, 0, (), 0.0))

    def _tell(self, label: str, share: float, at: Progress) -> None:
        if self._progress is None:
            return
        self._progress(
            replace(
                at,
                done_bytes=round(self._size * (self._done + share)),
                total_bytes=self._size * self._stages,
                resumed_bytes=self._size * self._resumed,
                working=(": ".join((label, *at.working[:1])),),
                elapsed_s=time.monotonic() - self._started,
            )
        )
