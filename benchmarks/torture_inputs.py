"""Inputs that change, shrink or vanish while a run reads them, two runs into one folder, and file systems that lack
something.

What was read before or after the change decides what a run ends in: the right bytes, the right bytes and a warning, or
one message and exit code 1. It never ends in bytes of neither input without a warning. Put back what it was, and the
next run leaves the right bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture_faults import require_message
from torture_runs import WAYS, begun, going_on, require_nothing_false, shown_before
from torture_seam import Counter, Seam, changes
from torture_world import (
    OLD,
    Content,
    Law,
    Outcome,
    World,
    commit_often,
    content,
    fork,
    fresh,
    must,
    require_same,
    rng_of,
)

from lox_stream.output_rules import MANIFEST
from lox_stream.verifying import verify_checksums

CHANGES = ("bytes", "shrinks", "vanishes", "is replaced", "grows")
KINDS = ("input", "input", "input", "two runs", "no locks", "no fallocate", "no fadvise")
LACKING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Changing(Counter):
    """Does something to an input at the `moment`-th call after a run began to write: after all inputs were planned."""

    def __init__(self, moment: int, change: Callable[[], None]) -> None:
        super().__init__(lambda name, args: bool(self.names) or changes(name, args))
        self._moment, self._change = moment, change

    def __call__(self, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        if self.number(name, args) == self._moment:
            self._change()
        return real(*args)


class Inputs:
    """The cases of this part."""

    part = "inputs"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._worlds, self._seed = worlds, seed

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        world, kind = self._worlds[number % len(self._worlds)], rng.choice(KINDS)
        way = rng.choice(["new", "resume", "overwrite"])
        out = begun(world, way, folder / "out", rng)
        if kind == "input":
            changed(world, way, out, folder, rng, outcome)
        elif kind == "two runs":
            at_once(world, way, out, rng, outcome)
        else:
            outcome.count(f"file systems with {kind}")
            must(world.run(out, *WAYS[way], before=lambda: lack(kind, rng.choice(LACKING))))
        require_same(content(out), world.reference, "in the end")


def changed(world: World, way: str, out: Path, folder: Path, rng: random.Random, outcome: Outcome) -> None:
    """A run during which an input changes, and the next one with the input as it was."""
    own = world.with_inputs(fresh(folder / "inputs"))
    before = shown_before(way, out)
    target = rng.choice(
        [path for side in (own.base, own.aligned) for path in sorted(side.rglob("*")) if path.is_file()]
    )
    change = rng.choice(CHANGES)
    seed = rng.randrange(1 << 30)
    moment = rng.randrange(rng.choice([60, 400]))

    def install() -> None:
        commit_often(1)
        Seam(Changing(moment, lambda: spoil(target, change, random.Random(seed))), out, own.base, own.aligned).install()

    ended = own.run(out, *WAYS[way], before=install)
    kind = "weights" if target.suffix in (".safetensors", ".bin") else "other files"
    outcome.count(f"inputs: {kind}, {change}")
    found = content(out)
    if ended.code == 0:
        accepted(own, out, found, outcome)
        flags = () if found == world.reference else WAYS["overwrite"]
    else:
        require_message(ended)
        require_nothing_false(without_documents(found, world), world, before)
        outcome.count(
            "inputs: the run ended with a message",
            *(["inputs: it named a file that was cut"] * ("was cut" in ended.said)),
        )
        flags = going_on(found, world, way)
    if flags == WAYS["resume"]:
        resumed = world.run(out, *flags)
        if "this is another run" not in resumed.said:  # it is where the input had changed before the journal was begun
            must(resumed)
            return
        require_message(resumed)
        outcome.count("inputs: a resume with what was there before is another run, and --overwrite begins it")
        flags = WAYS["overwrite"]
    if flags:
        must(world.run(out, *flags))


def accepted(world: World, out: Path, found: Content, outcome: Outcome) -> None:
    """A run succeeded although an input changed: with the bytes of before, or saying so; and what it says is true."""
    failed = [check.message for check in verify_checksums(out) if not check.ok]
    if failed:
        raise Law(f"its manifest is not that of its files: {failed[:2]}")
    warnings = " ".join(json.loads((out / MANIFEST).read_bytes())["warnings"])
    same = all(found[name] == world.reference[name] for name in world.weights)
    if "was modified" in warnings:
        outcome.count("inputs: finished, and the change was said")
    elif same:
        outcome.count("inputs: finished with the bytes of before")
    else:
        raise Law("other bytes than the inputs give, and no warning")


def without_documents(found: Content, world: World) -> Content:
    """What was published before the change; index and manifest may be of other inputs."""
    return {name: data for name, data in found.items() if name not in (*world.indexes, MANIFEST)}


def spoil(path: Path, change: str, rng: random.Random) -> None:
    """Change a file as another program would."""
    if change == "vanishes":
        path.unlink(missing_ok=True)
        return
    data = bytearray(path.read_bytes())
    if change == "shrinks":
        with path.open("r+b") as file:
            file.truncate(rng.randrange(len(data)))
        return
    if change == "grows":
        with path.open("ab") as file:
            file.write(bytes(rng.randint(1, 10_000)))
        return
    for _ in range(20):
        data[rng.randrange(len(data) // 2, len(data))] ^= 1
    if change == "bytes":
        with path.open("r+b") as file:
            file.write(data)
        return
    beside = path.with_name("replaced.tmp")
    beside.write_bytes(data)
    beside.replace(path)


def at_once(world: World, way: str, out: Path, rng: random.Random, outcome: Outcome) -> None:
    """Two runs into one folder, with other options where both may begin: the output is that of one of them.

    One does the work; the other says who does, or comes when it is done.
    """
    other = out.with_name("other.pickle")
    other.unlink(missing_ok=True)
    wait_s = rng.uniform(0, 0.08)
    other_options = () if way == "resume" else OLD

    def second() -> int:
        time.sleep(wait_s)
        other.write_bytes(pickle.dumps(world.run(out, *WAYS[way], *other_options, said=out.with_name("other.said"))))
        return 0

    pid = fork(second)
    runs = [world.run(out, *WAYS[way])]
    os.waitpid(pid, 0)
    runs.append(pickle.loads(other.read_bytes()))
    outcome.count("two runs into one folder")
    for ended in runs:
        if ended.code != 0:
            require_message(ended)
            outcome.count(
                "two runs: one was told that the other writes"
                if "is being written" in ended.said
                else "two runs: one came late"
            )
    if all(ended.code for ended in runs):
        raise Law(f"neither run did the work: {[ended.said for ended in runs]}")
    found = content(out)
    if found != world.old:
        require_same(found, world.reference, "after two runs")
    else:
        must(world.run(out, *WAYS["overwrite"]))


def lack(kind: str, code: int) -> None:
    """Let this process find a file system without something."""

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    if kind == "no locks":
        fcntl.flock = refuse  # type: ignore[assignment]
    elif kind == "no fallocate":
        os.posix_fallocate = refuse  # type: ignore[assignment]
    else:
        os.posix_fadvise = refuse  # type: ignore[assignment]
