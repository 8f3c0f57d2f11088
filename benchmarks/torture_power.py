"""Power that fails: a run's writes, syncs and renames are recorded, with all data, and replayed into the states that a
POSIX file system may leave, thousands of them. Each is looked at, and taken up again.

The model, that of Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), and of CrashMonkey (Mohan et
al., OSDI 2018), without the help that any one file system gives on top:

- What a file held at its last fsync or fdatasync is there. Of what was written since, each 4 KiB page is the old or the
  new one, in any combination; one write in ten is torn at 512 bytes. A page that was never written is zeros. The size
  is any that the file has had since.
- The names of a folder are as of its last fsync. Of the changes since (create, rename, unlink, mkdir), any subset has
  happened, with two limits: changes to one name happen in their order, and a rename happens as a whole.
- A sync of a file says nothing of its name, and a sync of a folder nothing of its files.

A call that had not returned is one that may or may not have happened. Half of the states are of the kinds that file
systems are known to leave: nothing of what is pending, all of it, names without data, data without names, names in
order.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torture_kills import WORDS, begun, going_on
from torture_seam import Killer, Seam, changes, path_of
from torture_world import (
    Content,
    Law,
    Outcome,
    World,
    command,
    commit_often,
    content,
    found_by_child,
    fresh,
    require_nothing_false,
    require_same,
    rng_of,
)

from lox_stream import extrapolate
from lox_stream.errors import LoxError

PAGE, SECTOR = 4096, 512
BATCHES = (1, 20_000)  # bytes after which the recorded run journals
FLAGS = {"new": (), "resume": ("--resume",), "overwrite": ("--overwrite",), "repair": ("--resume", "--repair")}
KINDS = (
    "nothing",
    "all",
    "names without data",
    "data without names",
    "names in order",
    "any",
    "any",
    "any",
    "any",
    "any",
)
FOLDER = -1  # in place of a file's number


@dataclass(frozen=True, slots=True)
class Op:
    """One change. `file` is a number that a file keeps through renames."""

    kind: str  # write, size, sync; create, rename, unlink, mkdir, sync folder
    file: int = 0
    offset: int = 0  # of a write; the size
    data: bytes = b""
    name: str = ""  # relative to the output's folder; "" is the folder itself
    new_name: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.new_name) if self.kind == "rename" else (self.name,)


@dataclass(slots=True)
class Disk:
    """What is durable: files by number, and names; and what is pending."""

    files: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    data: dict[int, list[Op]] = field(default_factory=dict)  # pending, of each file
    changes: list[Op] = field(default_factory=list)  # pending, of names

    def take(self, op: Op) -> None:
        """The next change of the log."""
        if op.kind in ("write", "size"):
            self.data.setdefault(op.file, []).append(op)
        elif op.kind == "sync":
            content = bytearray(self.files.get(op.file, b""))
            for pending in self.data.pop(op.file, []):
                apply(content, pending)
            self.files[op.file] = bytes(content)
        elif op.kind == "sync folder":
            mine = [change for change in self.changes if str(Path(change.name).parent) == (op.name or ".")]
            self.changes = [change for change in self.changes if change not in mine]
            rename_all(self.names, mine)
        else:
            self.changes.append(op)


def apply(content: bytearray, op: Op) -> None:
    if op.kind == "size":
        resize(content, op.offset)
        return
    if len(content) < op.offset:
        resize(content, op.offset)
    content[op.offset : op.offset + len(op.data)] = op.data


def resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def rename_all(names: dict[str, int], changes: list[Op]) -> None:
    for op in changes:
        if op.kind in ("create", "mkdir"):
            names[op.name] = FOLDER if op.kind == "mkdir" else op.file
        elif op.kind == "unlink":
            names.pop(op.name, None)
        else:
            names[op.new_name] = names.pop(op.name)


def left(disk: Disk, kind: str, rng: random.Random) -> Content:
    """One of the states that a crash may leave: the files by their names; a folder's name ends with a slash."""
    share = {"nothing": 0.0, "all": 1.0}.get(kind, rng.choice([0.1, 0.5, 0.9]))
    of_names = {"names without data": 1.0, "data without names": 0.0}.get(kind, share)
    of_data = {"names without data": 0.0, "data without names": 1.0}.get(kind, share)
    names = dict(disk.names)
    if kind == "names in order":
        rename_all(names, disk.changes[: rng.randint(0, len(disk.changes))])
    else:
        rename_all(names, happened(disk.changes, of_names, rng))
    state = Content()
    for name, file in names.items():
        if any(parent not in names for parent in parents(name)):
            continue
        if file == FOLDER:
            state[name + "/"] = b""
        else:
            state[name] = torn(disk.files.get(file, b""), disk.data.get(file, []), of_data, rng)
    return state


def parents(name: str) -> Iterator[str]:
    return (str(parent) for parent in Path(name).parents if str(parent) != ".")


def happened(changes: list[Op], share: float, rng: random.Random) -> list[Op]:
    """Some of the changes of names: those of one name in their order, up to one that did not happen."""
    kept: list[Op] = []
    lost: set[str] = set()
    for op in changes:
        if rng.random() < share and not lost & {*op.names, *parents(op.name)}:
            kept.append(op)
        else:
            lost |= {*op.names}
    return kept


def torn(durable: bytes, pending: list[Op], share: float, rng: random.Random) -> bytes:
    """A file with some of the pages that were written since its last sync."""
    content = bytearray(durable)
    sizes = [len(content)]
    whole = bytearray(durable)
    for op in pending:
        apply(whole, op)
        sizes.append(len(whole))
        if op.kind == "size":
            if rng.random() < share:
                resize(content, op.offset)
            continue
        unit = SECTOR if 0 < share < 1 and rng.random() < 0.1 else PAGE
        for start, end in pages(op.offset, op.offset + len(op.data), unit):
            if rng.random() < share:
                apply(content, Op("write", op.file, start, op.data[start - op.offset : end - op.offset]))
    resize(content, sizes[-1] if share == 1 else sizes[0] if share == 0 else rng.choice(sizes))
    return bytes(content)


def pages(start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """[start, end), cut where a page ends."""
    while start < end:
        stop = min(end, start - start % unit + unit)
        yield start, stop
        start = stop


class Recorder:
    """Keeps all that is written below a folder; one call at a time, so that the log has the order of what happened."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._lock = threading.RLock()
        self.ops: list[Op] = []
        self.first = Disk()
        self.names: dict[str, int] = {}
        self._numbers = iter(range(1 << 30))
        self._fds: dict[int, int] = {}
        for path in sorted(out.rglob("*")) if out.exists() else ():
            self.names[self._name(path)] = number = FOLDER if path.is_dir() else next(self._numbers)
            if path.is_file():
                self.first.files[number] = path.read_bytes()
        self.first.names = dict(self.names)

    def _name(self, path: Any) -> str:
        name = os.path.relpath(os.fspath(path), self._out)
        return "" if name == "." else name

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        keep = getattr(self, f"_{name}", None)
        if keep is None:
            return real(*args)
        with self._lock:
            return keep(real, *args)

    def _open(self, real: Callable[..., Any], path: Any, flags: int, *rest: Any) -> Any:
        name, was = self._name(path), os.path.lexists(path)
        fd = real(path, flags, *rest)
        if not isinstance(fd, int):
            return fd  # a file that is read
        if not was:
            self.names[name] = number = next(self._numbers)
            self.ops.append(Op("create", number, name=name))
        elif flags & os.O_TRUNC:
            self.ops.append(Op("size", self.names[name], 0))
        self._fds[fd] = FOLDER if Path(path).is_dir() else self.names[name]
        return fd

    def _write(self, real: Callable[..., Any], fd: int, data: Any) -> int:
        appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        offset = os.lseek(fd, 0, os.SEEK_END if appends else os.SEEK_CUR)
        return self._written(fd, data, offset, real(fd, data))

    def _pwrite(self, real: Callable[..., Any], fd: int, data: Any, offset: int) -> int:
        return self._written(fd, data, offset, real(fd, data, offset))

    def _written(self, fd: int, data: Any, offset: int, n_bytes: int) -> int:
        self.ops.append(Op("write", self._fds[fd], offset, bytes(memoryview(data)[:n_bytes])))
        return n_bytes

    def _ftruncate(self, real: Callable[..., Any], fd: int, size: int) -> None:
        real(fd, size)
        self.ops.append(Op("size", self._fds[fd], size))

    def _fsync(self, real: Callable[..., Any], fd: int) -> None:
        if self._fds[fd] == FOLDER:
            self.ops.append(Op("sync folder", name=self._name(path_of(fd))))
        else:
            self.ops.append(Op("sync", self._fds[fd]))

    _fdatasync = _fsync

    def _replace(self, real: Callable[..., Any], old: Any, new: Any) -> None:
        real(old, new)
        name, new_name = self._name(old), self._name(new)
        assert Path(name).parent == Path(new_name).parent, "a rename stays in its folder"
        self.names[new_name] = self.names.pop(name)
        self.ops.append(Op("rename", self.names[new_name], name=name, new_name=new_name))

    def _unlink(self, real: Callable[..., Any], path: Any) -> None:
        real(path)
        self.ops.append(Op("unlink", self.names.pop(self._name(path)), name=self._name(path)))

    def _mkdir(self, real: Callable[..., Any], path: Any, *rest: Any) -> None:
        real(path, *rest)
        self.names[self._name(path)] = FOLDER
        if self._name(path):
            self.ops.append(Op("mkdir", FOLDER, name=self._name(path)))


@dataclass(frozen=True, slots=True)
class Log:
    """A recorded run: what was in the folder, and every change."""

    world: World
    way: str
    before: Content | None  # what may be shown beside the new result
    first: Disk
    ops: tuple[Op, ...]

    def at(self, moment: int) -> Disk:
        """The disk when so many of the changes had been asked for."""
        disk = Disk(dict(self.first.files), dict(self.first.names))
        for op in self.ops[:moment]:
            disk.take(op)
        return disk


def recorded(world: World, way: str, folder: Path, batch: int) -> Log:
    """Record a run to its end; raises Law where the log does not tell what is on the disk."""
    rng = random.Random(batch)
    out = begun(world, "new" if way == "resume" else way, folder / "recorded", rng)
    if way == "resume":
        moment = len(world.calls(out, counts=changes)) // 2
        fresh(out)
        world.run(out, before=lambda: (commit_often(1), Seam(out, Killer(moment, "before")).install()))
    before = None if way in ("new", "resume") else content(out)

    def work() -> tuple[Disk, list[Op]]:
        recorder = Recorder(out)
        commit_often(batch)
        Seam(out, recorder).install()
        if command(world.arguments(out, *FLAGS[way])) != 0:
            raise Law("the run that was to be recorded failed")
        return recorder.first, recorder.ops

    log = Log(world, way, before, *found_by_child(work, folder))
    is_there = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for kind in ("all", "nothing"):
        told = left(log.at(len(log.ops)), kind, rng)
        require_same({name: data for name, data in told.items() if name[-1] != "/"}, is_there, f"{kind} of a whole log")
    return log


class Power:
    """The cases of this part: each is a state that a crash may leave, looked at and taken up again in this process."""

    part = "power"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._logs = [recorded(w, way, folder, batch) for w in worlds for way in FLAGS for batch in BATCHES]
        self._seen: set[int] = set()

    def case(self, number: int, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        log = self._logs[number % len(self._logs)]
        kind = rng.choice(KINDS)
        state = left(log.at(rng.randint(0, len(log.ops))), kind, rng)
        key = hash((number % len(self._logs), *sorted(state.items())))
        outcome.count("states", f"states: {kind}", f"states of {WORDS[FLAGS[log.way]]}")
        if key in self._seen:
            outcome.count("states met before")
            return
        self._seen.add(key)
        out = fresh(self._folder / "out")
        out.mkdir()
        for name, data in state.items():
            path = out / name
            (path if name[-1] == "/" else path.parent).mkdir(parents=True, exist_ok=True)
            if name[-1] != "/":
                path.write_bytes(data)
        self._take_up(log, out, outcome)

    def _take_up(self, log: Log, out: Path, outcome: Outcome) -> None:
        found = content(out)
        require_nothing_false(found, log.world, log.before)
        flags = going_on(found, log.world, "new" if log.way == "resume" else log.way)
        if not flags:
            outcome.count("states that are the finished output")
            return
        given = {flag.removeprefix("--"): True for flag in flags}
        outcome.count(f"states taken up by {' '.join(flags)}")
        try:
            extrapolate(log.world.base, log.world.aligned, out, options=log.world.options, **given)
        except LoxError as error:
            raise Law(f"{' '.join(flags)}: {error}; found {sorted(found)}") from error
        require_same(content(out), log.world.reference, f"after {' '.join(flags)}")
