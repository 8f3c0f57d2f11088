"""Whether what a folder holds is of the run that wants to go on with it: the state of it, or its damaged output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lox_stream.errors import ResumeError
from lox_stream.journal import Replay, identity, replay
from lox_stream.names import listing, printable, shown
from lox_stream.planning import Plan

MAY_CHANGE = ("on_nonfinite", "error")  # to "copy": what was finished under "error" met no such number


@dataclass(frozen=True, slots=True)
class Damage:
    """A tensor that is not what was written, or with `name` the same as `file` one of the other bytes of a file."""

    name: str
    file: str  # relative to the output's folder


@dataclass(frozen=True, slots=True)
class Survey:
    """What of an output is right, byte by byte: where a repair begins."""

    state: Replay  # its finished tensors are those that are right
    whole: frozenset[str]  # shards that are right, under their own names
    damaged: tuple[Damage, ...]
    checksums: dict[str, str]  # that the damaged tensors should have
    complete: bool  # a finished output, and not the state of a run
    warnings: tuple[str, ...] = ()


def resumable(plan: Plan) -> tuple[Replay | None, list[str]]:
    """What the journal in the output folder says, or None, and warnings; ResumeError if it is of another run."""
    assert plan.out is not None, "a plan that writes has a folder"
    state = replay(plan.out)
    return (None, []) if state is None else (state, agreed(plan, state.header))


def agreed(plan: Plan, began: Mapping[str, Any]) -> list[str]:
    """Warnings of a plan that is to go on with what has the identity `began`; ResumeError if that is another run."""
    refused, warned = differences(began, identity(plan))
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise ResumeError(
            f"{plan.out}: cannot be resumed, this is another run:{lines}\n"
            "Give the inputs and options it began with, or start again with --overwrite"
        )
    return warned


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What forbids to go on with the run of identity `old` as `new`, and what is only worth a warning."""
    refused = [
        f"--{printable(name).replace('_', '-')} is {shown(new['options'].get(name))}, the run began with {shown(value)}"
        for name, value in old["options"].items()
        if value != new["options"].get(name) and (name, value) != MAY_CHANGE
    ]
    warned = [
        f"{printable(name)} is {new['versions'].get(name)}, the run began with {printable(str(value))}: the last bits "
        "may differ"
        for name, value in old["versions"].items()
        if value != new["versions"].get(name)
    ]
    for side in ("base", "aligned"):
        before, now = old["inputs"][side], new["inputs"][side]
        if sorted(before) != sorted(now):
            refused.append(f"{side} has the files {listing(sorted(now))}, the run began with {listing(sorted(before))}")
            continue
        for name, was in before.items():
            changed = [key for key in ("size", "header", "sample") if key in was and was[key] != now[name][key]]
            if changed:
                refused.append(f"{side} {name}: not the file that the run began with ({', '.join(changed)} differ)")
            elif was.get("mtime_ns", now[name]["mtime_ns"]) != now[name]["mtime_ns"]:
                warned.append(f"{side} {name}: was modified since the run began; size and header are the same")
    return refused, warned
