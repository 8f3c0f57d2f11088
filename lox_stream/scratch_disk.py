"""A folder that holds of models that lie elsewhere what is in work: shards are fetched ahead, checked, used, dropped.

Each model is laid out once, its weights as holes (`remote.lay_out`), so that it is planned and mapped like any other. A
shard that is needed takes the place of its hole, whole and checked; when nobody needs it the hole comes back. What is
needed when is known, so what has to make room is what is needed last (Belady, 1966).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from lox_stream import files
from lox_stream.checkpoint import TensorInfo
from lox_stream.errors import Cancelled, CheckpointError, DataError, OutputError
from lox_stream.matching import Step
from lox_stream.names import printable
from lox_stream.remote import PIECE_BYTES, RemoteFile, is_weights, lay_out, lay_out_tables

CONNECTIONS = 8  # requests at a time, each for 8 MiB
DEFAULT_BYTES = 40 << 30
PREFIX, MARKER = ".lox-stream-scratch-", "a-scratch-of-lox-stream"
COMMON_PARTS = (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024)  # MiB, of uploads in parts
_WAKE_S = 0.1

Jobs = Sequence[Sequence[Step]]


def read_infos(steps: Iterable[Step]) -> list[TensorInfo]:
    """All that steps read, of both sides, scales and factors included."""
    found: list[TensorInfo | None] = []
    for step in steps:
        found += [step.aligned, step.base]
        found += [scaled.scale for scaled in (step.scaled, step.base_scaled) if scaled is not None]
        found += [] if step.factors is None else [step.factors.a, step.factors.b]
    return [info for info in found if info is not None]


class Scratch:
    """The folder, and the threads that fill it: a context manager. At most `capacity` bytes of shards lie there.

    Raises OutputError for a folder that cannot be used or has not so many bytes free; DataError from `need` for what
    cannot be fetched.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self._stack = contextlib.ExitStack()
        self._remote: dict[Path, RemoteFile] = {}  # by where it lies here, links resolved
        self._there: set[Path] = set()
        self._pins: dict[Path, int] = {}
        self._uses: dict[Path, dict[str, None]] = {}  # names of the tensors that need it, in order, until they are done
        self._at: dict[str, int] = {}  # when a tensor's turn comes
        self._demanded: list[Path] = []
        self._opaque: set[str] = set()  # servers whose ETags say nothing of the bytes
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self.warnings: list[str] = []
        self.fetched_bytes = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack, files.explained(self.folder, "use it as scratch", "Choose another."):
            files.make_folder(self.folder)
            _sweep(self.folder)
            self.root = _own_folder(self.folder, stack).resolve()
            self._pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="lox-fetch"))
            self._thread = threading.Thread(target=self._run, name="lox-fetch", daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def remove(self) -> None:
        """Remove what lies there, at once and whatever is on its way; for who leaves without the context's end."""
        self._stop.set()
        shutil.rmtree(self.root, ignore_errors=True)

    def _end(self) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        self._thread.join()

    def lay_out(self, name: str, found: Sequence[RemoteFile], *, dry: bool) -> Path:
        """A folder that looks like the model of these files. Raises CheckpointError."""
        folder, holes = self.root / name, self.root / "holes" / name
        beside = 0 if dry else sum(file.size for file in found if not is_weights(file.name))
        if beside > self.capacity:
            raise OutputError(
                f"scratch: the files beside the weights take {beside} bytes, and it has {self.capacity}. Give it more: "
                "--scratch-size; or is the address that of more than one model?"
            )
        self.capacity -= beside
        with files.explained(folder, "lay out the headers of the model", "Choose another --scratch."):
            for _ in self._pool.map(lambda file: lay_out(file, holes, dry=dry), found):
                pass
            for file in found:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(holes / file.name, path)
                if is_weights(file.name):
                    self._remote[path] = file
            lay_out_tables(found, folder)
        return folder

    def set_aside(self, n_bytes: int) -> None:
        """Keep so many bytes for other things. Raises OutputError where nothing would be left."""
        if n_bytes >= self.capacity:
            raise OutputError(
                f"scratch: two of the largest files that are written take {n_bytes} bytes, and it has {self.capacity}. "
                f"Give it more with --scratch-size, or write smaller files with --max-shard-size"
            )
        self.capacity -= n_bytes

    def room_for(self, jobs: Jobs) -> None:
        """Raise OutputError where the shards of some job do not lie here at once."""
        largest = max((sum(self._remote[path].size for path in self._shards(job)) for job in jobs), default=0)
        if largest > self.capacity:
            raise OutputError(
                f"scratch: the shards that one tensor is computed from take {largest} bytes at once, and it has "
                f"{self.capacity}. Give it more: --scratch-size {-(-largest // (1 << 20))}MiB"
            )

    def expect(self, jobs: Jobs) -> None:
        """What will be needed, in this order; what was told before keeps its turn."""
        with self._changed:
            for job in jobs:
                for step in job:
                    self._at.setdefault(step.name, len(self._at))
                    for path in self._shards([step]):
                        self._uses.setdefault(path, {}).setdefault(step.name)
            self._changed.notify_all()

    def need(self, job: Sequence[Step], closed: Callable[[], bool]) -> None:
        """Wait until all that a job reads is there; it stays until `done`. Raises DataError, Cancelled."""
        shards = self._shards(job)
        with self._changed:
            for path in shards:
                self._pins[path] = self._pins.get(path, 0) + 1
            self._demanded += shards
            self._changed.notify_all()
            while not all(path in self._there for path in shards):
                if self._failure is not None:
                    raise self._failure
                if closed():
                    raise Cancelled("stopped on request")
                self._changed.wait(_WAKE_S)
            self._demanded = [path for path in self._demanded if path not in self._there]

    def done(self, job: Sequence[Step]) -> None:
        """A job has read what it needed; the last one of a shard drops it."""
        with self._changed:
            for path in self._shards(job):
                self._pins[path] -= 1
            for step in job:
                for path in self._shards([step]):
                    self._uses.get(path, {}).pop(step.name, None)
            for path in [path for path in self._there if self._next_use(path) == math.inf and not self._pins.get(path)]:
                self._drop(path)
            self._changed.notify_all()

    def _shards(self, job: Sequence[Step]) -> list[Path]:
        """The shards that a job reads which lie elsewhere, each once."""
        return [path for path in dict.fromkeys(info.path for info in read_infos(job)) if path in self._remote]

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stop.is_set() or self._choose() is not None)
                    if self._stop.is_set():
                        return
                    path = self._choose()
                    assert path is not None, "it was waited for"
                    for other in self._in_the_way(path) or ():
                        self._drop(other)
                self._fetch(path)
                with self._changed:
                    self._there.add(path)
                    self._changed.notify_all()
        except BaseException as error:  # raised where somebody waits for a shard
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _choose(self) -> Path | None:
        """What to fetch next: what somebody waits for, else what is needed first; None without room for it."""
        waited_for = [path for path in self._demanded if path not in self._there]
        if waited_for:
            return waited_for[0] if self._in_the_way(waited_for[0]) is not None else None
        absent = [path for path in self._uses if path not in self._there and self._next_use(path) < math.inf]
        first = min(absent, key=self._next_use, default=None)
        return first if first is not None and self._in_the_way(first) is not None else None

    def _next_use(self, path: Path) -> float:
        """When a shard is needed next, as a number to compare; infinite where it is not."""
        return self._at[next(iter(self._uses[path]))] if self._uses.get(path) else math.inf

    def _in_the_way(self, path: Path) -> list[Path] | None:
        """What has to be dropped to make room for a shard, needed last first; None where that is not enough."""
        room = self.capacity - sum(self._remote[other].size for other in self._there) - self._remote[path].size
        turn = -1.0 if path in self._demanded else self._next_use(path)
        free = [other for other in self._there if not self._pins.get(other) and self._next_use(other) > turn]
        dropped: list[Path] = []
        for other in sorted(free, key=self._next_use, reverse=True):
            if room >= 0:
                break
            dropped.append(other)
            room += self._remote[other].size
        return dropped if room >= 0 else None

    def _drop(self, path: Path) -> None:
        """Put the hole back."""
        self._there.remove(path)
        beside = path.with_name(path.name + ".hole")
        with files.explained(self.folder, "make room in the scratch", files.GO_ON, DataError):
            os.link(self.root / "holes" / path.relative_to(self.root), beside)
            beside.replace(path)

    def _fetch(self, path: Path) -> None:
        """Bring a shard here, whole and checked; a second time where its bytes are not what was promised."""
        file = self._remote[path]
        beside = path.with_name(path.name + ".fetching")
        try:
            found = self._download(file, beside)
            if not _is_right(file, found) and _server(file) not in self._opaque:
                again = self._download(file, beside)
                self._judge(file, found, again)
            os.utime(beside, ns=(file.modified_ns, file.modified_ns))
            beside.replace(path)
        except (CheckpointError, OSError) as error:
            problem = error if isinstance(error, CheckpointError) else _said(error, self.folder)
            raise DataError(f"{problem}\n{files.GO_ON}") from error

    def _judge(self, file: RemoteFile, found: Mapping[str, str], again: Mapping[str, str]) -> None:
        """Of a second download: right, or the same, where an ETag is no checksum; else CheckpointError."""
        if _is_right(file, again):
            return
        if file.sha256 or found != again:
            raise CheckpointError(
                [
                    f"{printable(file.address)}: its bytes are not what was promised (sha256 or MD5 differ), expected "
                    "the same, and a second download did not help. The file is damaged there, or on the way"
                ]
            )
        self._opaque.add(_server(file))
        self.warnings.append(
            f"{printable(file.address)}: its ETag is no checksum of its bytes, as with encryption by KMS: what is "
            "fetched there is held against its length alone"
        )

    def _download(self, file: RemoteFile, path: Path) -> dict[str, str]:
        """Write a file, several pieces at a time, and give its checksums, hashed in order as the pieces come."""
        digests = _digests(file)
        with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            os.ftruncate(fd, file.size)

            def piece(start: int) -> memoryview:
                data = file.read(start, min(start + PIECE_BYTES, file.size), self._stop)
                files.write_at(fd, data, start)
                return data

            coming: deque[Future[memoryview]] = deque()
            try:
                for start in range(0, file.size, PIECE_BYTES):
                    if self._stop.is_set():
                        raise Cancelled("stopped on request")
                    coming.append(self._pool.submit(piece, start))
                    if len(coming) > CONNECTIONS:
                        self._arrived(coming.popleft().result(), digests)
                while coming:
                    self._arrived(coming.popleft().result(), digests)
            finally:
                for one in coming:
                    one.cancel()
                for one in coming:  # which write to the file that is about to be closed
                    if not one.cancelled():
                        one.exception()
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def _arrived(self, data: memoryview, digests: Mapping[str, Any]) -> None:
        self.fetched_bytes += len(data)
        for digest in digests.values():
            digest.update(data)


class _Parts:
    """The ETag of an upload in parts: the MD5 of the MD5s of its parts, and their number."""

    def __init__(self, part_bytes: int) -> None:
        self._part, self._bytes, self._count = part_bytes, 0, 0
        self._whole, self._now = hashlib.md5(), hashlib.md5()

    def update(self, data: memoryview) -> None:
        while data:
            taken = data[: self._part - self._bytes]
            self._now.update(taken)
            self._bytes += len(taken)
            data = data[len(taken) :]
            if self._bytes == self._part:
                self._close()

    def _close(self) -> None:
        self._whole.update(self._now.digest())
        self._now, self._bytes, self._count = hashlib.md5(), 0, self._count + 1

    def hexdigest(self) -> str:
        if self._bytes:
            self._close()
        return f"{self._whole.hexdigest()}-{self._count}"


def _digests(file: RemoteFile) -> dict[str, Any]:
    """What may tell that the bytes are right: sha256 of the hub, MD5 of S3, of parts of likely sizes."""
    if file.sha256:
        return {"sha256": hashlib.sha256()}
    digest, _, count = file.etag.partition("-")
    if len(digest) != 32 or not file.size:
        return {}
    if not count:
        return {"md5": hashlib.md5()}
    if not count.isdecimal() or int(count) < 1:
        return {}
    least = -(-file.size // (int(count) << 20))  # MiB, rounded up
    sizes = [size << 20 for size in dict.fromkeys((*COMMON_PARTS, least))]
    return {str(size): _Parts(size) for size in sizes if -(-file.size // size) == int(count)}


def _is_right(file: RemoteFile, found: Mapping[str, str]) -> bool:
    """Whether one of the checksums is what was promised; True where nothing was."""
    return not found or (file.sha256 or file.etag) in found.values()


def _server(file: RemoteFile) -> str:
    """The bucket or host."""
    return "/".join(file.address.split("/")[:3])


def _said(error: OSError, path: Path) -> str:
    first = "Free some space, or choose another --scratch. " if error.errno in files.FULL else ""
    return f"{path}: the scratch cannot be written: {error.strerror or error}. {first}".rstrip()


def _sweep(folder: Path) -> None:
    """Remove what killed runs left: folders that nobody holds the lock of."""
    for path in folder.glob(PREFIX + "*"):
        if path.is_dir() and not path.is_symlink() and (path / MARKER).is_file():
            with contextlib.suppress(OSError):
                fd, locked = files.lock_folder(path)
                try:
                    if locked:
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    files.close(fd)


def _own_folder(folder: Path, stack: contextlib.ExitStack) -> Path:
    """A new folder in a folder, locked; it is removed with the stack."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    fd, _ = files.lock_folder(path)
    stack.callback(files.close, fd)
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    (path / MARKER).touch()  # by which the next run knows that it may remove it
    return path


@contextmanager
def scratch_at(folder: Path | None, capacity: int) -> Iterator[Scratch]:
    """A scratch in a folder, TMPDIR without one; `capacity` 0: 40 GiB, or half of what is free where that is less.

    Raises OutputError for more than is free.
    """
    place = folder if folder is not None else Path(tempfile.gettempdir())
    with files.explained(place, "use it as scratch", "Choose another --scratch."):
        files.make_folder(place)
        free = shutil.disk_usage(place).free
    if capacity > free:
        raise OutputError(
            f"{printable(place)}: --scratch-size is {capacity} bytes, and {free} are free there. Free some, choose "
            "another --scratch, or ask for less"
        )
    with Scratch(place, capacity or min(DEFAULT_BYTES, free // 2)) as scratch:
        yield scratch
