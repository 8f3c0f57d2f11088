"""kill -9 at random moments: of new runs, runs over a finished output, repairs, and the resumed runs that follow.

A moment is a time, uniform over what a run takes, or the n-th call that changes the disk: before it, after it, or with
half of a write done. After each kill nothing false may be shown; after the last resume no byte may differ.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from torture_runs import WAYS, WORDS, begun, going_on, require_nothing_false, shown_before, stage
from torture_seam import Killer, Seam, changes
from torture_world import (
    Ended,
    Outcome,
    World,
    commit_often,
    content,
    must,
    require_same,
    rng_of,
)

BATCHES = (1, 20_000, 1 << 30)  # bytes after which a run journals
MOST_KILLS = 4  # of one output


class Kills:
    """The cases of this part; each is one output, killed again and again on its way."""

    part = "kills"
    cases = None

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        self._worlds, self._seed = worlds, seed
        self._measured: dict[tuple[str, str], tuple[int, float]] = {}

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        rng = rng_of(self._seed, self.part, number)
        world, way = self._worlds[number % len(self._worlds)], rng.choice([*WAYS])
        calls, run_s = self._measure(world, way, folder / "measured")
        out = begun(world, way, folder / "out", rng)
        before = shown_before(way, out)
        flags = WAYS[way]
        outcome.count("outputs", f"outputs of {world.shape.name}", f"outputs by {way}")
        for _ in range(rng.randint(1, MOST_KILLS)):
            ended, moment = killed(world, out, flags, rng, calls, run_s)
            found = content(out)
            require_nothing_false(found, world, before)
            if ended.code != -signal.SIGKILL:
                must(ended)
                break
            where = "during a repair" if way == "repair" else stage(found, world)
            outcome.count("kills", f"kills at a {moment}", f"kills {where}", f"kills of {WORDS[flags]}")
            flags = going_on(found, world, way)
            if not flags:
                break
        else:
            must(world.run(out, *flags))
        require_same(content(out), world.reference, "after the last run")

    def _measure(self, world: World, way: str, out: Path) -> tuple[int, float]:
        """How many calls that change the disk a run makes when it journals each tensor, and its seconds."""
        key = world.shape.name, way
        if key not in self._measured:
            begun(world, way, out, random.Random(0))
            started = time.monotonic()
            names = world.calls(out, *WAYS[way], counts=changes)
            self._measured[key] = len(names), time.monotonic() - started
        return self._measured[key]


def killed(
    world: World, out: Path, flags: tuple[str, ...], rng: random.Random, calls: int, run_s: float
) -> tuple[Ended, str]:
    """A run that is killed at a random moment, if it lasts so long, and what kind of moment that was."""
    batch = rng.choice(BATCHES)
    if rng.random() < 0.4:
        return world.run(out, *flags, before=lambda: commit_often(batch), kill_s=rng.uniform(0, run_s)), "time"
    how, moment = rng.choice(["before", "after", "half"]), rng.randrange(calls)

    def before() -> None:
        commit_often(batch)
        Seam(Killer(moment, how), out).install()

    return world.run(out, *flags, before=before), f"call, {how} it"
