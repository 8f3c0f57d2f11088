"""The thread that makes finished tensors durable, in batches: their bytes first, then their records in the journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lox_stream import files
from lox_stream.facts import TensorFacts
from lox_stream.files import GO_ON
from lox_stream.journal import Journal
from lox_stream.placing import Place

BATCH_BYTES = 1 << 30  # finished tensors are synced and journalled together: this much work, or
BATCH_S = 30.0  # this much time, is what a killed run loses
STOP_BYTES = 256 << 20  # a run that is stopped syncs no more than this: about a second of a disk


class Committer:
    """Takes finished tensors from any thread; see `put`, `check`, `finish`.

    What is finished when `trusted()` says no is not recorded: a resumed run makes it again. A batch is `batch_s` long,
    None: BATCH_S.
    """

    def __init__(self, journal: Journal, trusted: Callable[[], bool], batch_s: float | None = None) -> None:
        self._journal, self._trusted = journal, trusted
        self._batch_s = BATCH_S if batch_s is None else batch_s
        self._queue: list[tuple[TensorFacts, Place]] = []
        self._held_bytes = 0  # queued, or in the batch that is being synced
        self._ending = self._stopping = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lox-stream committer", daemon=True)
        self._thread.start()

    def put(self, facts: TensorFacts, place: Place) -> None:
        """Queue a tensor; waits while the disk is two batches behind. Raises what went wrong in the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes < 2 * BATCH_BYTES or self._failure is not None)
            self.check()
            self._queue.append((facts, place))
            self._held_bytes += place.n_bytes
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure

    def finish(self, stopping: bool = False) -> None:
        """Commit what is queued and end the thread; when stopping, only if that is soon done."""
        with self._changed:
            self._ending, self._stopping = True, stopping
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            ending = False
            while not ending:
                batch, ending = self._gather()
                self._commit(batch)
                with self._changed:
                    self._held_bytes -= _size(batch)
                    self._changed.notify_all()
        except BaseException as error:  # kept for the threads that work, which raise it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _gather(self) -> tuple[list[tuple[TensorFacts, Place]], bool]:
        """The next batch, and whether it is the last one. The disk begins with each tensor as it comes."""
        batch: list[tuple[TensorFacts, Place]] = []
        due_s: float | None = None
        while _size(batch) < BATCH_BYTES:
            with self._changed:
                left_s = None if due_s is None else max(0.0, due_s - time.monotonic())
                self._changed.wait_for(lambda: self._queue or self._ending, timeout=left_s)
                new, self._queue = self._queue, []
                ending = self._ending
            for _, place in new:
                files.start_writing_back(place.fd, place.start, place.n_bytes)
            batch += new
            if ending or not new:
                return batch, ending
            due_s = due_s or time.monotonic() + self._batch_s
        return batch, False

    def _commit(self, batch: list[tuple[TensorFacts, Place]]) -> None:
        if not batch or (self._stopping and _size(batch) > STOP_BYTES):
            return
        for fd, path in {place.fd: place.path for _, place in batch}.items():
            with files.explained(path, "sync", GO_ON):
                files.sync_data(fd)
        if self._trusted():
            with files.explained(self._journal.path, "write the journal", GO_ON):
                self._journal.append([facts for facts, _ in batch])
        for _, place in batch:
            files.drop_cache(place.fd, place.start, place.n_bytes)


def _size(batch: list[tuple[TensorFacts, Place]]) -> int:
    return sum(place.n_bytes for _, place in batch)
