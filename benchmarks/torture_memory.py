"""Too little memory: limits on what a process may map (RLIMIT_AS), and a cgroup of 1 GiB.

A run either succeeds or says so in one message, leaves nothing false, and is taken up again once there is memory. One
limit in five is for a process of its own, from what Python needs to more than enough; the others for a forked one,
where torch is loaded already, just above what it has mapped.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

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
    must,
    require_same,
    rng_of,
)

from lox_stream.messages import LEAST_MAPPED

MIB = 1 << 20
LIMITS_MIB = (20, 1600)  # of a process of its own
GROWTH_MIB = (0, 500)  # of a forked one
STEP_MIB = 20
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
            ended = own_process(world, out, WAYS[way], limit)
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


def own_process(world: World, out: Path, flags: tuple[str, ...], limit: int) -> Ended:
    """The run as a command of its own, with a limit on what it may map."""
    command = [sys.executable, "-P", "-m", "lox_stream", *world.arguments(out, *flags)]
    limited = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # noqa: E731
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=HANGS_S, check=False, preexec_fn=limited, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise Law(f"hangs with {limit // MIB} MiB") from error
    return Ended(ran.returncode, ran.stderr)


class Cgroup:
    """One case: two tensors of 1.2 GB, in a cgroup of 1 GiB; the maps of the inputs and the pages of the output count.

    The same run outside of the cgroup gives the bytes to compare with.
    """

    part = "cgroup"
    cases = 1
    least_minutes = 10

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._seed = seed
        self.skipped: list[str] = []
        try:
            with limited_group():
                pass
        except OSError as error:
            self.skipped = [f"no cgroup can be made here: {error}"]
            self.cases = 0

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law. On the disk: what lies in /dev/shm would count as memory."""
        with tempfile.TemporaryDirectory(prefix="lox-torture-") as name, limited_group() as join:
            root = Path(name)
            must(in_child(lambda: write_large(root, self._seed), root / "said"))
            sums = {}
            for out, inside in ((root / "within", True), (root / "without", False)):
                started = time.monotonic()
                ended = own_process(root, out, join if inside else lambda: None)
                must(ended)
                sums[inside] = digest(out / "model.safetensors")
                outcome.count(f"runs {'within' if inside else 'without'} a limit of 1 GiB")
                outcome.counts[f"seconds {'within' if inside else 'without'} it"] = round(time.monotonic() - started)
                shutil.rmtree(out)
            if sums[True] != sums[False]:
                raise Law("other bytes than without the limit")
