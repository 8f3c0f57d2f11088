"""Power that fails: a run's writes, syncs and renames are recorded, with all data, and replayed into the states that a
POSIX file system may leave (`torture_disk`), thousands of them. Each is looked at, and taken up again."""

from __future__ import annotations

import fcntl
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture_disk import FOLDER, KINDS, Disk, Op, left
from torture_runs import WAYS, WORDS, begun, going_on, require_nothing_false, shown_before
from torture_seam import Seam, path_of
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
    require_same,
    rng_of,
)

BATCHES = (1, 20_000)  # bytes after which the recorded run journals


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


def recorded(world: World, way: str, batch: int, folder: Path) -> Log:
    """Record a run to its end; raises Law where the log does not tell what is on the disk."""
    rng = random.Random(batch)
    out = begun(world, way, folder / "recorded" / "out", rng)
    before = shown_before(way, out)

    def work() -> tuple[Disk, list[Op]]:
        recorder = Recorder(out)
        commit_often(batch)
        Seam(recorder, out).install()
        if command(world.arguments(out, *WAYS[way])) != 0:
            raise Law("the run that was to be recorded failed")
        return recorder.first, recorder.ops

    log = Log(world, way, before, *found_by_child(work, folder))
    is_there = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for kind in ("all", "nothing"):
        told = left(log.at(len(log.ops)), kind, rng)
        require_same({name: data for name, data in told.items() if name[-1] != "/"}, is_there, f"{kind} of a whole log")
    return log


class Power:
    """The cases of this part: each is a state that a crash may leave, looked at and taken up again."""

    part = "power"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._seed = seed
        self._recorded = [(world, way, batch) for world in worlds for way in WAYS for batch in BATCHES]
        self._logs: dict[int, Log] = {}
        self._seen: set[int] = set()

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        log = self._log(number % len(self._recorded), folder)
        kind = rng.choice(KINDS)
        state = left(log.at(rng.randint(0, len(log.ops))), kind, rng)
        key = hash((number % len(self._recorded), *sorted(state.items())))
        outcome.count("states", f"states: {kind}", f"states of {WORDS[WAYS[log.way]]}")
        if key in self._seen:
            outcome.count("states met before")
            return
        self._seen.add(key)
        out = fresh(folder / "out")
        out.mkdir()
        for name, data in state.items():
            path = out / name
            (path if name[-1] == "/" else path.parent).mkdir(parents=True, exist_ok=True)
            if name[-1] != "/":
                path.write_bytes(data)
        self._take_up(log, out, outcome)

    def _log(self, which: int, folder: Path) -> Log:
        if which not in self._logs:
            self._logs[which] = recorded(*self._recorded[which], folder)
        return self._logs[which]

    def _take_up(self, log: Log, out: Path, outcome: Outcome) -> None:
        found = content(out)
        require_nothing_false(found, log.world, log.before)
        flags = going_on(found, log.world, log.way)
        if not flags:
            outcome.count("states that are the finished output")
            return
        outcome.count(f"states taken up by {' '.join(flags)}")
        ended = log.world.run(out, *flags)
        if ended.code != 0:
            raise Law(f"{' '.join(flags)}: exit code {ended.code}: {ended.said[-1500:]}; found {sorted(found)}")
        require_same(content(out), log.world.reference, f"after {' '.join(flags)}")
