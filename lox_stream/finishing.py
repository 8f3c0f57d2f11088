"""The parts of a run put together: held against each other, moved, verified byte by byte, published as one output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.api import Progress, Summary, execute
from lox_stream.device import settled
from lox_stream.errors import OutputError
from lox_stream.facts import TensorFacts
from lox_stream.files import GO_ON
from lox_stream.journal import Journal, Replay, byte_options, identity, session
from lox_stream.manifest import PACKAGES, read_manifest, totals
from lox_stream.names import listing, printable
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL, MANIFEST, is_finished
from lox_stream.planning import DEFAULTS, Plan, plan
from lox_stream.repairing import facts_of, require_sealed
from lox_stream.sampling import check_inputs, options_of
from lox_stream.sharing import FOLDER

AGAIN = "Run them: lox-stream run ... --part I/N, with --resume where they were begun"


def finish(
    out: str | Path,
    *,
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    machine: Options = DEFAULTS,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Summary:
    """Put the parts in `out` together: what one run would have written, bit by bit.

    All parts have to be there, finished, and of one run. `base` and `aligned` are where the first part had them, unless
    they are given. Every byte is read once and held against its checksum; a tensor that is damaged is made again, with
    the memory and threads of `machine`. A crash leaves a state that the same call goes on with.

    Raises OutputError for parts that are missing or do not agree, and what `plan` and `execute` raise.
    """
    folder = Path(out).absolute()
    parts = _parts(folder)
    if is_finished(folder):
        return _swept(folder, parts)
    said = {number: _manifest(parts[number]) for number in parts}
    first = said[min(said)]
    told = options_of(folder, first["options"])
    options = replace(told, part="", memory_bytes=machine.memory_bytes, threads=machine.threads)
    base, aligned = (given or first["inputs"][side]["path"] for side, given in (("base", base), ("aligned", aligned)))
    made = settled(plan(base, aligned, options=options))
    _require_one_run(folder, said, made)
    facts = {name: row for found in said.values() for name, row in facts_of(found["tensors"]).items()}
    lost = [name for name in made.written.tensors if name not in facts]
    if lost:
        raise OutputError(f"{printable(folder)}: no part has {listing(lost)}, expected each tensor in one. {AGAIN}")
    _move(parts, replace(made, out=folder), facts)
    going_on = plan(base, aligned, folder, options=options, resume=True)
    summary = execute(going_on, resume=True, progress=progress, cancel=cancel)
    for place in parts.values():
        _remove(place)
    return replace(summary, warnings=(*summary.warnings, *_other_versions(said)))


def _parts(folder: Path) -> dict[int, Path]:
    """The folders of the parts by their number: all of them, or what is left where they are together already."""
    named = [path for path in folder.glob("part-*") if FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    counts = {int(FOLDER.sub(r"\2", path.name)) for path in named}
    if not named:
        raise OutputError(f"{printable(folder)}: holds no parts of a run, expected such as part-1-of-8. Check the path")
    if len(counts) > 1:
        raise OutputError(
            f"{printable(folder)}: holds parts of {sorted(counts)}, expected one number. Remove the others"
        )
    (count,) = counts
    parts = {int(FOLDER.sub(r"\1", path.name)): path for path in named}
    all_of_them = {number: folder / f"part-{number}-of-{count}" for number in range(1, count + 1)}
    lacking = [f"{number}/{count}" for number, place in all_of_them.items() if not is_finished(place)]
    if lacking and not is_finished(folder):
        raise OutputError(
            f"{printable(folder)}: parts are missing or not finished: {listing(lacking)}; expected all {count}. {AGAIN}"
        )
    return dict(sorted(parts.items()))


def _swept(folder: Path, parts: Mapping[int, Path]) -> Summary:
    """Of an output that was put together before a crash left folders of its parts; raises OutputError for another."""
    if any(path.suffix in (".safetensors", ".partial") for place in parts.values() for path in place.rglob("*")):
        raise OutputError(f"{printable(folder)}: holds a finished output, and parts of a run. Move one of them away")
    for place in parts.values():
        _remove(place)
    facts = facts_of(read_manifest(folder)["tensors"])
    warnings = (f"{folder}: was put together before; what was left of its parts is removed",)
    return Summary(folder, totals(facts.values()), 0.0, 0, 0, warnings)


def _manifest(part: Path) -> dict[str, Any]:
    require_sealed(part)
    return read_manifest(part)


def _require_one_run(folder: Path, said: Mapping[int, Mapping[str, Any]], made: Plan) -> None:
    """All parts were told the same, and read the inputs that are read now."""
    wanted = byte_options(made.options)
    for number, found in said.items():
        told = options_of(folder, found["options"])
        if told.part != f"{number}/{len(said)}" or byte_options(replace(told, part="")) != wanted:
            raise OutputError(
                f"{printable(folder)}: part {number} was told other options than part {min(said)}, expected the same. "
                "Run it again with --overwrite"
            )
        check_inputs(found["inputs"], made)


def _other_versions(said: Mapping[int, Mapping[str, Any]]) -> list[str]:
    found = {tuple(str(one["versions"].get(name)) for name in PACKAGES) for one in said.values()}
    if len(found) < 2:
        return []
    return [f"the parts were made by several versions ({', '.join(PACKAGES)}): {sorted(found)}: last bits may differ"]


def _move(parts: Mapping[int, Path], made: Plan, facts: Mapping[str, TensorFacts]) -> None:
    """A journal that calls all tensors finished, and then the files where it looks for them."""
    assert made.out is not None, "it is the folder of the parts"
    with files.explained(made.out, "put the parts together", GO_ON):
        if not (made.out / JOURNAL).exists():
            Journal(made.out, Replay(identity(made), (session(),), dict(facts))).close()
        for shard in made.written.shards:
            target = made.out / shard.name
            source = next((place / shard.name for place in parts.values() if (place / shard.name).exists()), None)
            if source is not None:
                files.make_folder(target.parent)
                source.replace(target)
                files.sync_folder(target.parent)


def _remove(part: Path) -> None:
    """What is left of a part: its manifest, and empty folders."""
    with files.explained(part, "remove what is left of a part", "The output itself is finished. Remove the folder."):
        (part / MANIFEST).unlink(missing_ok=True)
        for place in sorted((path for path in part.rglob("*") if path.is_dir()), reverse=True):
            place.rmdir()
        part.rmdir()
