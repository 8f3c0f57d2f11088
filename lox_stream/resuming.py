"""Whether what a folder holds is of the run that wants to go on with it: the state of it, or its damaged output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.checkpoint import Checkpoint, files_of
from lox_stream.errors import ResumeError
from lox_stream.facts import TensorFacts
from lox_stream.journal import Replay, identity, replay
from lox_stream.names import listing, place_name, printable, shown
from lox_stream.planning import Plan, inputs_of
from lox_stream.shards import Shard, TensorInfo, written_bytes, written_start

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


def resumable(plan: Plan, own: Mapping[str, Any] | None = None) -> tuple[Replay | None, list[str]]:
    """What the journal in the output folder says, or None, and warnings; ResumeError if it is of another run.

    `own` is the identity of `plan`, where it is known already.
    """
    assert plan.out is not None, "a plan that writes has a folder"
    state = replay(plan.out)
    return (None, []) if state is None else (state, agreed(plan, state.header, own))


def agreed(plan: Plan, began: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> list[str]:
    """Warnings of a plan that is to go on with what has the identity `began`; ResumeError if that is another run."""
    refused, warned = differences(began, own or identity(plan))
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise ResumeError(
            f"{place_name(plan.out or '')}: cannot be resumed, this is another run:{lines}\n"
            "Give the inputs and options it began with, or start again with --overwrite"
        )
    return warned


def changed_inputs(plan: Plan) -> tuple[str, ...]:
    """A message for each shard of the inputs that is not as it was when the run was planned."""
    return tuple(
        f"{printable(path)}: was modified while the run read it. Run again with --overwrite to be sure"
        for path in changed_files(inputs_of(plan).values())
    )


def changed_files(checkpoints: Iterable[Checkpoint]) -> list[Path]:
    """The shards that are not as they were when the checkpoints were opened, by size and time."""
    changed = []
    for shard in (shard for checkpoint in checkpoints for shard in files_of(checkpoint)):
        try:
            now = shard.path.stat()
            same = (now.st_mtime_ns, now.st_size) == (shard.mtime_ns, shard.size_bytes)
        except OSError:
            same = False
        if not same:
            changed.append(shard.path)
    return changed


def written_file(folder: Path, shard: Shard, finished: Mapping[str, TensorFacts]) -> Path | None:
    """The file that the journal's records of a shard speak of; None where it is gone or another.

    Under its final name it may also be that of an output which was to be replaced: there each tensor is read once.
    """
    final = folder / shard.name
    whole = all(tensor.name in finished for tensor in shard.tensors)
    path = final if whole and not files.partial(final).exists() else files.partial(final)
    if not path.is_file() or path.stat().st_size != written_bytes(shard):
        return None
    with files.opened(path) as fd:
        same = b"".join(files.read_pieces(fd, 0, len(shard.header))) == shard.header
        if same and path == final:
            same = all(_holds(fd, tensor, finished[tensor.name]) for tensor in shard.tensors)
    return path if same else None


def _holds(fd: int, tensor: TensorInfo, facts: TensorFacts) -> bool:
    return files.checksum_of(fd, written_start(tensor), tensor.n_bytes) == facts.checksum


def _called(name: str) -> str:
    """An option as it is typed."""
    if name == "solved_for":
        return "the largest of several --alpha (0.0: one alone)"
    typed = {"form": "--target", "factor_dtype": "--dtype", "scaling": "--alpha"}
    return typed.get(name, f"--{printable(name).replace('_', '-')}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What forbids to go on with the run of identity `old` as `new`, and what is only worth a warning."""
    refused = [
        f"{_called(name)} is {shown(new['options'].get(name))}, the run began with {shown(value)}"
        for name, value in old["options"].items()
        if value != new["options"].get(name) and (name, value) != MAY_CHANGE
    ]
    warned = [
        f"{printable(name)} is {new['versions'].get(name)}, the run began with {printable(str(value))}: the last bits "
        "may differ"
        for name, value in old["versions"].items()
        if value != new["versions"].get(name)
    ]
    for side, now in new["inputs"].items():
        before = old["inputs"].get(side, {})
        if sorted(before) != sorted(now):
            refused.append(f"{side} has the files {listing(sorted(now))}, the run began with {listing(sorted(before))}")
            continue
        for name, was in before.items():
            file = f"{side} {printable(name)}"
            changed = [key for key in ("size", "header", "sample") if key in was and was[key] != now[name][key]]
            if changed:
                refused.append(f"{file}: not the file that the run began with ({', '.join(changed)} differ)")
            elif was.get("mtime_ns", now[name]["mtime_ns"]) != now[name]["mtime_ns"]:
                warned.append(f"{file}: was modified since the run began; size and header are the same")
    return refused, warned
