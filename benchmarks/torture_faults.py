"""Errors of the operating system: at every call that a run makes, in turn, each error that this call can meet.

The run ends with one message of its own, or as if nothing had been; nothing false is shown; and the next run, with the
fault gone, leaves the right bytes. Reads and writes that move less than they were asked for, and a storm of signals,
are no errors: such a run has to succeed.
"""

from __future__ import annotations

import errno
import random
import signal
from dataclasses import dataclass
from pathlib import Path

from torture_runs import WAYS, begun, going_on, require_nothing_false, shown_before
from torture_seam import CHANGING, ERRORS, Fault, Seam, Shortener
from torture_world import Ended, Law, Outcome, World, commit_often, content, must, require_same

TRIED = {  # which ways of which shapes: half an hour has room for all of their cases
    "one file": tuple(WAYS),
    "three shards": ("overwrite",),
    "pytorch_model.bin": ("new",),
}
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
HARMLESS = ("short reads and writes", "a storm of signals")
HARMLESS_CASES = 20  # of each, for a shape and a way
STORM_S = 0.0005
NOT_OURS = "Check the path, its permissions and its disk"  # of the message for an OSError that nobody explained


@dataclass(frozen=True, slots=True)
class Case:
    """A run, and what happens to it."""

    world: World
    way: str
    what: str  # the name of a call, or one of HARMLESS
    moment: int  # of all calls of the run; of HARMLESS a seed
    code: int = 0
    lasting: bool = False  # every later call meets it too, if it can

    def __str__(self) -> str:
        named = f", {errno.errorcode[self.code]}{' from then on' if self.lasting else ''}" if self.code else ""
        return f"{self.world.shape.name}, {self.way}, {self.what} {self.moment}{named}"


class Faults:
    """The cases of this part, in an order that the seed gives, so that the first of them are a fair sample."""

    part = "faults"

    def __init__(self, worlds: list[World], folder: Path, seed: int) -> None:
        chosen = [(world, way) for world in worlds for way in TRIED.get(world.shape.name, ())]
        self._all = [case for world, way in chosen for case in cases_of(world, way, folder / "out")]
        random.Random(seed).shuffle(self._all)
        self.cases = len(self._all)

    def case(self, number: int, folder: Path, outcome: Outcome) -> None:
        """Raises Law."""
        case = self._all[number]
        out = begun(case.world, case.way, folder / "out", random.Random(number))
        before = shown_before(case.way, out)
        ended = case.world.run(out, *WAYS[case.way], before=lambda: install(case, out))
        outcome.count(case.what if not case.code else f"{errno.errorcode[case.code]} at {case.what}")
        try:
            found = content(out)
            require_nothing_false(found, case.world, before)
            if ended.code == 0 or case.what in HARMLESS:
                must(ended)
                require_same(found, case.world.reference, "a run that succeeded")
                outcome.count("runs that succeeded all the same")
                return
            require_message(ended)
            outcome.count("runs that ended with a message")
            flags = going_on(found, case.world, case.way)
            if flags:
                must(case.world.run(out, *flags))
            require_same(content(out), case.world.reference, "after the next run")
        except Law as law:
            raise Law(f"{case}: {law}") from law


def cases_of(world: World, way: str, out: Path) -> list[Case]:
    """Of calls that change something every error; of the many alike that read, one of the errors each."""
    begun(world, way, out, random.Random(0))
    names = world.calls(out, *WAYS[way], roots=[out, world.base, world.aligned])
    cases = [Case(world, way, what, number) for what in HARMLESS for number in range(HARMLESS_CASES)]
    for moment, name in enumerate(names):
        codes = [code for code, met_by in ERRORS.items() if name in met_by]
        changing = name in CHANGING and name not in ("open", "close")
        for code in codes if changing else [codes[moment % len(codes)]]:
            cases.append(Case(world, way, name, moment, code))
            if code in LASTING and changing:
                cases.append(Case(world, way, name, moment, code, lasting=True))
    return cases


def install(case: Case, out: Path) -> None:
    """Let it happen in this process."""
    commit_often(1)
    if case.what == "a storm of signals":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, STORM_S, STORM_S)
        return
    short = case.what == "short reads and writes"
    around = Shortener(random.Random(case.moment)) if short else Fault(case.moment, case.code, case.lasting)
    Seam(around, out, case.world.base, case.world.aligned).install()


def require_message(ended: Ended) -> None:
    """A run that failed ends with exit code 1 and one message that the program made for this."""
    if ended.code != 1:
        raise Law(f"exit code {ended.code}, expected 1; it said: {ended.said[-500:]}")
    if "Traceback" in ended.said or "this is a bug" in ended.said:
        raise Law(f"a traceback: {ended.said[-1500:]}")
    if NOT_OURS in ended.said:
        raise Law(f"no LoxError: {ended.said[-500:]}")
    if ended.said.count("\nerror: ") + ended.said.startswith("error: ") != 1:
        raise Law(f"expected one message, found: {ended.said[-500:]}")
