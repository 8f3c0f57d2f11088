"""The parts of a run put together: held against each other, moved, verified byte by byte, published as one output."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.api import Progress, Summary, execute
from lox_stream.device import settled
from lox_stream.errors import CheckpointError, InUseError, OutputError
from lox_stream.facts import TensorFacts
from lox_stream.journal import Journal, Replay, byte_options, identity, session
from lox_stream.manifest import PACKAGES, read_manifest, totals
from lox_stream.names import listing, printable, shown
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL, MANIFEST, foreign_weights, is_finished, output_names
from lox_stream.planning import DEFAULTS, Plan, plan
from lox_stream.repairing import facts_of, require_sealed
from lox_stream.resuming import MAY_CHANGE
from lox_stream.sampling import check_inputs, options_of
from lox_stream.sharing import FOLDER, folder_of_part

AGAIN = "Run them: lox-stream run ... --part I/N, with --resume where they were begun"


def finish(
    out: str | Path,
    *,
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    machine: Options = DEFAULTS,
    trusting: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Summary:
    """Put the parts in `out` together: what one run would have written, bit by bit.

    All parts have to be there, finished, and of one run. `base` and `aligned` are where the first part had them, unless
    they are given. Every byte is read once and held against its checksum; a tensor that is damaged is made again, with
    the memory and threads of `machine`. `trusting`: the parts are taken as they were written and synced, as a run takes
    what it has written itself, and are not read. A crash leaves a state that the same call goes on with.

    Raises OutputError for parts that are missing or do not agree, and what `plan` and `execute` raise.
    """
    folder = Path(out).absolute()
    parts = _parts(folder)
    with contextlib.ExitStack() as stack:
        for place in parts.values():
            _lock(place, stack)
        if is_finished(folder):
            return _swept(folder, parts)
        said = {number: _manifest(parts[number]) for number in parts}
        first = said[1]
        told = _told(folder, said)
        options = replace(told, part="", memory_bytes=machine.memory_bytes, threads=machine.threads)
        base = _there("base", base, first["inputs"]["base"]["path"])
        aligned = _there("aligned", aligned, first["inputs"]["aligned"]["path"])
        made = settled(plan(base, aligned, options=options))
        _require_one_run(folder, said, made)
        _require_room(folder, parts, said, made)
        facts = {name: row for found in said.values() for name, row in facts_of(found["tensors"]).items()}
        lost = [name for name in made.written.tensors if name not in facts]
        if lost:
            raise OutputError(f"{printable(folder)}: no part has {listing(lost)}, expected each tensor in one. {AGAIN}")
        _move(parts, replace(made, out=folder), facts, trusting=trusting)
        going_on = plan(base, aligned, folder, options=options, resume=True)
        summary = execute(going_on, resume=True, progress=progress, cancel=cancel)
        left = [warning for place in parts.values() for warning in _remove(place)]
        return replace(summary, warnings=(*summary.warnings, *_other_versions(said), *left))


def _lock(part: Path, stack: contextlib.ExitStack) -> None:
    """Nobody writes a part, or puts the parts together, while we do."""
    with files.explained(part, "lock the part", AGAIN):
        try:
            fd, _ = files.lock_folder(part)
        except BlockingIOError:
            raise InUseError(
                f"{printable(part)}: is being written, or put together with others, by another process. Wait for it"
            ) from None
        stack.callback(files.close, fd)


def _there(side: str, given: str | Path | None, had: str) -> str | Path:
    """Where an input lies; raises CheckpointError."""
    if given is None and not Path(had).exists():
        raise CheckpointError(
            [f"{side}: {printable(had)}: is not there, where part 1 had it. Say where it lies now: --{side} DIR"]
        )
    return had if given is None else given


def _parts(folder: Path) -> dict[int, Path]:
    """The folders of the parts by their number: all of them, or what is left where they are together already."""
    found = {
        path: FOLDER.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_dir()
    }
    named = {path: (int(name[1]), int(name[2])) for path, name in found.items() if name is not None}
    if is_finished(folder):
        return {number: path for path, (number, _) in sorted(named.items(), key=lambda item: item[1])}
    if not named:
        raise OutputError(f"{printable(folder)}: holds no parts of a run, expected such as part-1-of-8. Check the path")
    counts = {count for _, count in named.values()}
    if len(counts) > 1:
        raise OutputError(f"{printable(folder)}: holds parts of {sorted(counts)}, expected one number. Remove others")
    (count,) = counts
    linked = [path.name for path, (number, _) in named.items() if path.is_symlink() or not 1 <= number <= count]
    if linked:
        raise OutputError(
            f"{printable(folder)}: {listing(linked)}: is a link, or a number that no part has; expected folders of the "
            f"parts 1 to {count}. Move it away"
        )
    all_of_them = {number: folder_of_part(folder, f"{number}/{count}") for number in range(1, count + 1)}
    lacking = [f"{number}/{count}" for number, place in all_of_them.items() if not is_finished(place)]
    if lacking:
        raise OutputError(
            f"{printable(folder)}: parts are missing or not finished: {listing(lacking)}; expected all {count}. {AGAIN}"
        )
    return all_of_them


def _require_room(folder: Path, parts: Mapping[int, Path], said: Mapping[int, Mapping[str, Any]], made: Plan) -> None:
    """Nothing is in the way of the files, and nothing lies beside them in the parts."""
    strays = [
        str(path.relative_to(folder))
        for number, place in parts.items()
        for path in sorted(place.rglob("*"))
        if not path.is_dir() and path.relative_to(place).as_posix() not in {*said[number]["shards"], MANIFEST}
    ]
    blocked = [name for name in output_names(made.written) if (folder / name).is_dir()]
    problems = foreign_weights(folder, made.written)
    if strays or blocked:
        problems.append(
            f"{printable(folder)}: {listing([*strays, *blocked])}: is not of the run, expected nothing else there. "
            "Move it away"
        )
    if problems:
        raise OutputError("\n".join(problems))


def _swept(folder: Path, parts: Mapping[int, Path]) -> Summary:
    """Of an output that is whole already: what a crash left of its parts is removed; raises OutputError for others."""
    if any(path.suffix in (".safetensors", ".partial") for place in parts.values() for path in place.rglob("*")):
        raise OutputError(f"{printable(folder)}: holds a finished output, and parts of a run. Move one of them away")
    left = [warning for place in parts.values() for warning in _remove(place)]
    facts = facts_of(read_manifest(folder)["tensors"])
    warnings = (f"{folder}: is finished already", *left)
    return Summary(folder, totals(facts.values()), 0.0, 0, 0, warnings)


def _manifest(part: Path) -> dict[str, Any]:
    require_sealed(part)
    return read_manifest(part)


def _told(folder: Path, said: Mapping[int, Mapping[str, Any]]) -> Options:
    """What part 1 was told, but for what a resumed part may have been told anew."""
    all_told = [options_of(folder, said[number]["options"]) for number in sorted(said)]
    copying = any(told.on_nonfinite == "copy" for told in all_told)
    return replace(all_told[0], on_nonfinite="copy" if copying else all_told[0].on_nonfinite)


def _require_one_run(folder: Path, said: Mapping[int, Mapping[str, Any]], made: Plan) -> None:
    """All parts were told the same, and read the inputs that are read now."""
    wanted = byte_options(made.options)
    for number, found in said.items():
        told = options_of(folder, found["options"])
        has = byte_options(replace(told, part=""))
        other = [name for name in wanted if has[name] != wanted[name] and (name, has[name]) != MAY_CHANGE]
        if told.part != f"{number}/{len(said)}" or other:
            what = ", ".join(f"{name} is {shown(has[name])} and {shown(wanted[name])}" for name in other) or "its part"
            raise OutputError(
                f"{printable(folder)}: parts {number} and 1 were told other options ({what}), expected the "
                "same. Run the wrong one again: lox-stream run ... --part I/N --overwrite"
            )
        check_inputs(found["inputs"], made)


def _other_versions(said: Mapping[int, Mapping[str, Any]]) -> list[str]:
    found = {tuple(str(one["versions"].get(name)) for name in PACKAGES) for one in said.values()}
    if len(found) < 2:
        return []
    return [f"the parts were made by several versions ({', '.join(PACKAGES)}): {sorted(found)}: last bits may differ"]


def _move(parts: Mapping[int, Path], made: Plan, facts: Mapping[str, TensorFacts], *, trusting: bool) -> None:
    """A journal that calls all tensors finished, and then the files where it looks for them.

    Under its final name it reads a file before it believes it, and under that of a file in work it does not.
    """
    assert made.out is not None, "it is the folder of the parts"
    with files.explained(made.out, "put the parts together", "Mend that, and call `lox-stream finish` again."):
        if not (made.out / JOURNAL).exists():
            Journal(made.out, Replay(identity(made), (session(),), dict(facts))).close()
        for shard in made.written.shards:
            target = files.partial(made.out / shard.name) if trusting else made.out / shard.name
            source = next((place / shard.name for place in parts.values() if (place / shard.name).exists()), None)
            if source is not None:
                files.make_folder(target.parent)
                source.replace(target)
                files.sync_folder(target.parent)


def _remove(part: Path) -> list[str]:
    """What is left of a part: its manifest, and empty folders. Says what stays."""
    try:
        (part / MANIFEST).unlink(missing_ok=True)
        for place in sorted((path for path in part.rglob("*") if path.is_dir()), reverse=True):
            place.rmdir()
        part.rmdir()
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{printable(part)}: is put together, and what else lies in it was left there: {error.strerror}"]
    return []
