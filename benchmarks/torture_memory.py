"""Too little memory: limits on what a process may map (RLIMIT_AS), and a cgroup of 1 GiB.

A run either succeeds or says so in one message, leaves nothing false, and is taken up again once there is memory. One
limit in five is for a process of its own, from what Python needs to more than enough; the others for a forked one,
where torch is loaded already, just above what it has mapped.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torture_faults import require_message
from torture_runs import WAYS, begun, going_on, require_nothing_false, shown_before
from torture_world import (
    HANGS_S,
    Ended,
    Law,
    Outcome,
    World,
    commit_often,
    content,
    in_child,
    must,
    require_same,
    rng_of,
)

from lox_stream.files import checksum_of
from lox_stream.messages import LEAST_MAPPED
from lox_stream.shards import header_of

MIB = 1 << 20
LIMITS_MIB = (20, 1600)  # of a process of its own
GROWTH_MIB = (0, 500)  # of a forked one
STEP_MIB = 20
LARGE, LARGE_ROWS = (36_864, 16_384), 1024
NOT_OURS = ("OpenBLAS", "libgomp", "Fatal Python error", "Could not find platform", "terminate called", "MemoryError")
CGROUPS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
)


class Memory:
    """The cases of this part: a limit each."""

    part = "memory"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._worlds, self._seed = worlds, seed

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        world, way = self._worlds[number % len(self._worlds)], rng.choice(["new", "resume", "overwrite"])
        out = begun(world, way, folder / "out", rng)
        before = shown_before(way, out)
        if rng.random() < 0.2:
            limit = rng.randrange(*LIMITS_MIB, STEP_MIB) * MIB
            ended = own_process(
                world.arguments(out, *WAYS[way]), lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            )
            kind = "own process"
        else:
            limit = 0
            growth = rng.randrange(*GROWTH_MIB) * MIB
            ended = world.run(out, *WAYS[way], before=lambda: limit_growth(growth))
            kind = "forked process"
        found = content(out)
        require_nothing_false(found, world, before)
        if ended.code == 0:
            require_same(found, world.reference, "a run that succeeded")
            outcome.count(f"{kind}: succeeded")
            return
        if limit >= LEAST_MAPPED:
            raise Law(f"{limit // MIB} MiB were not enough: {ended.said[-500:]}")
        outcome.count(f"{kind}: {told(ended)}")
        flags = going_on(found, world, way)
        if flags:
            must(world.run(out, *flags))
        require_same(content(out), world.reference, "after the next run")


def told(ended: Ended) -> str:
    """What a run said that did not succeed; raises Law for a bug, or for nothing."""
    if ended.said.startswith(NOT_OURS) and "this is a bug" not in ended.said:
        return "ended by a library or by Python, which said so"
    require_message(ended)
    return "one message"


def limit_growth(growth: int) -> None:
    """Let this process map so much more than it has."""
    commit_often(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + growth, mapped + growth))


def own_process(arguments: list[str], before: Callable[[], None]) -> Ended:
    """A command line as a process of its own, which calls `before` first."""
    command = [sys.executable, "-P", "-m", "lox_stream", *arguments]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=HANGS_S, check=False, preexec_fn=before, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise Law(f"hangs: not at its end after {HANGS_S:.0f} s") from error
    return Ended(ran.returncode, ran.stderr)


class Cgroup:
    """One case: two tensors of 1.2 GB in a cgroup of 1 GiB, where maps of the inputs and pages of the output count.

    The same run outside of the cgroup gives the bytes to compare with.
    """

    part = "cgroup"
    least_minutes = 10  # of the whole; it takes some two of them

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._seed, self.cases = seed, 1
        self.skipped: list[str] = []
        try:
            with limited_group():
                pass
        except OSError as error:
            self.skipped, self.cases = [f"no cgroup can be made here: {error}"], 0

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law. On the disk: what lies in /dev/shm would count as memory."""
        with tempfile.TemporaryDirectory(prefix="lox-torture-") as name, limited_group() as join:
            root = Path(name)
            must(in_child(lambda: write_large(root, self._seed), root / "said"))
            sums = []
            for where, before in (("within", join), ("without", lambda: None)):
                out = root / where
                paths = [f"--{side}={root / side}" for side in ("base", "aligned")]
                started = time.monotonic()
                must(own_process(["run", *paths, f"--out={out}", "--quiet"], before))
                outcome.counts[f"seconds {where} the limit"] = round(time.monotonic() - started)
                with (out / "model.safetensors").open("rb") as file:
                    sums.append(checksum_of(file.fileno(), 0, os.fstat(file.fileno()).st_size))
                shutil.rmtree(out)
            if sums[0] != sums[1]:
                raise Law("other bytes than without the limit")


def write_large(root: Path, seed: int) -> int:
    """base and aligned of one bfloat16 matrix; their difference has a known rank and some noise of rounding."""
    m, n = LARGE
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(LARGE_ROWS, n, generator=generator) * 0.02
    left, right = torch.randn(m, 8, generator=generator), torch.randn(8, n, generator=generator) * 1e-4
    header = header_of({"w": {"dtype": "BF16", "shape": LARGE, "data_offsets": [0, 2 * m * n]}}, None)
    for side in ("base", "aligned"):
        (root / side).mkdir()
        with (root / side / "model.safetensors").open("wb") as file:
            file.write(header)
            for first in range(0, m, LARGE_ROWS):
                rows = w.roll(first // LARGE_ROWS, 1)
                if side == "aligned":
                    rows = rows + left[first : first + LARGE_ROWS] @ right
                file.write(rows.bfloat16().view(torch.int16).numpy().data)
    return 0


@contextlib.contextmanager
def limited_group() -> Iterator[Callable[[], None]]:
    """A cgroup of 1 GiB, of version 1 or 2: what a process calls to enter it. Raises OSError where none can be made."""
    for where, limit in CGROUPS:
        group = Path(where) / f"lox-torture-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            refused = error
            continue
        try:
            (group / limit).write_text(str(1 << 30))
            yield lambda: (group / "cgroup.procs").write_text("0") and None  # noqa: B023
            return
        finally:
            group.rmdir()
    raise refused
