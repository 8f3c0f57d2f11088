"""The ways of a run that are tortured, what must hold of what it leaves, and how it is taken up again."""

from __future__ import annotations

import random
from pathlib import Path

from torture_world import Content, Law, World, content, fresh

from lox_stream.output_rules import JOURNAL, MANIFEST, PARTIAL

WAYS = {"new": (), "resume": ("--resume",), "overwrite": ("--overwrite",), "repair": ("--resume", "--repair")}
WORDS = {
    WAYS["new"]: "new runs",
    WAYS["resume"]: "resumed runs",
    WAYS["overwrite"]: "runs over a finished output",
    WAYS["repair"]: "repairs",
}


def begun(world: World, way: str, out: Path, rng: random.Random) -> Path:
    """The folder as it is before the first run: absent, half done, finished with other options, or damaged."""
    if way == "new":
        return fresh(out)
    fresh(out, world.made({"resume": "half", "overwrite": "old", "repair": "reference"}[way]))
    for name in world.weights if way == "repair" else ():
        data = bytearray((out / name).read_bytes())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (out / name).write_bytes(data)
    return out


def shown_before(way: str, out: Path) -> Content | None:
    """What may be shown beside the new result: an output that is to be replaced or repaired."""
    return content(out) if way in ("overwrite", "repair") else None


def going_on(found: Content, world: World, way: str) -> tuple[str, ...]:
    """How the run is taken up again by who finds this in the folder; () where it is finished."""
    if way == "repair":
        return WAYS["repair"]
    if found == world.reference:
        return ()
    return WAYS["resume" if JOURNAL in found or way != "overwrite" else "overwrite"]


def require_nothing_false(found: Content, world: World, old: Content | None = None) -> None:
    """An index or a manifest stands only over weights that are whole and of one run; so does each file of weights."""
    allowed = [version for version in (world.reference, old) if version is not None]
    weights = {name: found.get(name) for name in world.weights}
    for name, data in weights.items():
        if data is not None and data not in [version[name] for version in allowed]:
            raise Law(f"{name} is under its final name, and not whole")
    shown = {*world.indexes, MANIFEST} & found.keys()
    if shown:
        fitting = [version for version in allowed if all(weights[name] == version[name] for name in weights)]
        if not fitting:
            raise Law("an index or a manifest stands over weights that are not whole, or of two runs")
        for name in shown:
            if all(found[name] != version.get(name) for version in fitting):
                raise Law(f"{name} is not that of the weights")


def stage(found: Content, world: World) -> str:
    """How far a run had come that left this; of a run that makes all tensors."""
    if JOURNAL not in found:
        return "after the journal" if found == world.reference else "before the journal"
    if MANIFEST in found:
        return "after the manifest"
    if any(name in found for name in world.indexes):
        return "after an index"
    finished = found[JOURNAL].count(b'\n{"tensor":')
    if finished < len(world.shape.shapes) * (2 if world.shape.kind == "pipeline" else 1):
        return "while tensors were written" if finished else "before the first record"
    whole = all(name + PARTIAL in found for name in world.weights)
    return "while companions were copied" if whole else "while weights were renamed"
