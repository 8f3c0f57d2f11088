"""Rules for the output folder, checked before anything is written: where it may lie, what it may hold, its space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lox_stream.checkpoint import Checkpoint, companion_path, index_names, models_in
from lox_stream.companions import OWN_FILES
from lox_stream.layout import is_index
from lox_stream.names import is_plain_relative, listing, printable
from lox_stream.sealing import opened
from lox_stream.shards import is_regular, parse_json, written_bytes

MANIFEST, JOURNAL = OWN_FILES
MODEL_CARD, PARTIAL = "README.md", ".partial"  # a file is NAME.partial until it is whole
_OVERHEAD_BYTES = 1 << 20  # manifest, journal, model card: with 1 KiB for each tensor


def output_names(aligned: Checkpoint) -> tuple[str, ...]:
    """Every name that a run writes in its folder, relative: the finished files, then the same while in work."""
    shards = [shard.name for shard in aligned.shards]
    companions = [path.as_posix() for path in aligned.companions]
    names = tuple(dict.fromkeys([*shards, *index_names(aligned), *companions, MANIFEST, MODEL_CARD, JOURNAL]))
    return (*names, *(name + PARTIAL for name in names))


def is_finished(out: Path) -> bool:
    """Whether a folder holds a finished output, and no run that goes on."""
    return (out / MANIFEST).exists() and not (out / JOURNAL).exists()


def is_new(out: Path) -> bool:
    """Whether a folder holds nothing of a run."""
    return not ((out / MANIFEST).exists() or (out / JOURNAL).exists())


def output_problems(
    out: Path,
    roots: Mapping[str, Path],
    catalogue: Checkpoint | None,
    *,
    resume: bool,
    overwrite: bool,
    repair: bool = False,
    dry: bool = False,
) -> tuple[list[str], list[str]]:
    """Problems and warnings of an output folder for inputs that lie in `roots`, by what they are called.

    `catalogue` is the opened aligned checkpoint; None where that failed: then only the folder itself is checked. Too
    little space is a warning where the plan is `dry`.
    """
    try:
        return _looked_at(out, roots, catalogue, resume=resume, overwrite=overwrite, repair=repair, dry=dry)
    except OSError as error:
        at = f" ({printable(error.filename)})" if error.filename else ""
        found = f"{printable(out)}: cannot be looked at: {error.strerror}{at}"
        return [f"{found}. Choose another --out or change its permissions"], []


def _looked_at(
    out: Path,
    roots: Mapping[str, Path],
    catalogue: Checkpoint | None,
    *,
    resume: bool,
    overwrite: bool,
    repair: bool,
    dry: bool,
) -> tuple[list[str], list[str]]:
    """As `output_problems`; raises OSError."""
    shown = printable(out)
    problems = _place_problems(out, roots)
    if problems:
        return problems, []
    held = held_names(out, output_names(catalogue) if catalogue is not None else ())
    warnings: list[str] = []
    if repair and not {JOURNAL, MANIFEST} & {*held}:
        return [_unknown(out, held)], []
    if held and not (resume or overwrite):
        problems.append(_not_empty(out, held))
    elif held and catalogue is not None:
        problems += _content_problems(out, held, catalogue, resume=resume, repair=repair)
    if resume and not repair and JOURNAL not in held:
        warnings.append(f"{shown}: holds no unfinished run; --resume starts from the beginning")
    if catalogue is not None and not problems:
        (warnings if dry else problems).extend(_space_problems(out, catalogue, resume=resume))
    return problems, warnings


def held_names(folder: Path, ours: Iterable[str]) -> tuple[str, ...]:
    """What a folder holds, relative and sorted; () where there is no folder.

    Only sub-folders that a run writes in (by the names `ours`) are looked into; another one is `name/`.
    """
    if not folder.exists():
        return ()
    held: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            held.append(path.name)
            continue
        inside = f"{path.name}/"
        ours_inside = [name.removeprefix(inside) for name in ours if name.startswith(inside)]
        held += [inside + name for name in held_names(path, ours_inside)] if ours_inside else [inside]
    return tuple(held)


def superseded(out: Path, aligned: Checkpoint) -> tuple[str, ...]:
    """What an earlier run left in a folder, in any of its folders, under names that this one does not write; sorted.

    As its sealed manifest names it, and of the size that it says; and weights that it had still in work.
    """
    ours = set(output_names(aligned))
    sizes = {name: size for name, size in _written_sizes(out / MANIFEST).items() if is_plain_relative(name)}
    found = []
    for name in held_names(out, (*ours, *sizes)):
        path = out / name
        in_work = name.endswith(".safetensors" + PARTIAL) and _is_looked_at(name, aligned)
        is_earlier = name in sizes and path.is_file() and path.lstat().st_size == sizes[name]
        if name not in ours and (in_work or is_earlier) and not path.is_symlink():
            found.append(name)
    return tuple(found)


def foreign_weights(out: Path, aligned: Checkpoint) -> list[str]:
    """A message for each file that a loader would take beside or instead of the output, and that is not ours."""
    ours = output_names(aligned)
    foreign = [
        name
        for name in held_names(out, ours)
        if name not in ours and _is_weights(name) and _is_looked_at(name, aligned)
    ]
    earlier = superseded(out, aligned) if foreign else ()  # which reads the manifest there
    return [
        f"{printable(out / name)}: would be loaded beside or instead of the output, expected no weights of which no "
        f"{MANIFEST} that is as it was written tells that an earlier run wrote them. Move it away, or choose another "
        "--out"
        for name in foreign
        if name not in earlier
    ]


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or is_index(name)


def _is_looked_at(name: str, aligned: Checkpoint) -> bool:
    """Whether a file lies where a loader of the output looks for weights."""
    return name[: name.rfind("/") + 1] in {model.prefix for model in models_in(aligned)}


def _written_sizes(path: Path) -> dict[str, int]:
    """The files that a manifest says its run wrote, with their bytes; none where there is none that is whole."""
    try:
        if not is_regular(path):
            return {}
        found = opened(path.read_bytes())
        said, _ = parse_json(found.data)
        rows = {**said["shards"], **said["files"]}
        sizes = {name: row["size"] for name, row in rows.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return sizes if found.state in ("whole", "mended") else {}


def _place_problems(out: Path, inputs: Mapping[str, Path]) -> list[str]:
    """Where the folder lies: it must be or become a folder, apart from both inputs, writable."""
    shown = printable(out)
    try:
        real = out.resolve()
        parent = nearest_folder(out)
        if not parent.is_dir():
            return [f"{shown}: {printable(parent)} is a file, expected a folder or a new path. Choose another --out"]
    except (OSError, RuntimeError, ValueError) as error:
        return [f"{shown}: cannot be used: {error}. Choose another --out"]
    problems = []
    for side, path in inputs.items():
        folder = (path if path.is_dir() else path.parent).resolve()
        if real == folder:
            problems.append(
                f"{shown}: is the folder of {side} ({printable(path)}), expected another one: inputs are never touched"
            )
        elif path.is_dir() and real.is_relative_to(folder):
            problems.append(
                f"{shown}: lies inside {side} ({printable(path)}), expected a folder apart. Choose another --out"
            )
        elif path.exists() and folder.is_relative_to(real):
            problems.append(
                f"{shown}: {side} ({printable(path)}) lies inside it, expected an empty folder. Choose another --out"
            )
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(
            f"{shown}: no permission to write in {printable(parent)}, or it is read-only. Choose another --out"
        )
    return problems


def linked_problems(out: Path, inputs: Mapping[str, Iterable[Path]]) -> list[str]:
    """Files of the inputs that links lead into the output folder to, whatever folder they are named in."""
    real = out.resolve()
    problems = []
    for side, paths in inputs.items():
        inside = [path for path in paths if path.resolve().is_relative_to(real)]
        if inside:
            problems.append(
                f"{printable(out)}: holds files of {side}, to which links lead: {listing(map(str, inside))}; expected "
                "a folder apart: inputs are never touched. Choose another --out"
            )
    return problems


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest parent that exists (links followed)."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        if path.is_symlink():
            raise OSError(f"{printable(path)} is a link to {printable(path.readlink())}, which does not exist")
        path = path.parent
    return path


def _not_empty(out: Path, held: Iterable[str]) -> str:
    shown = printable(out)
    what = "holds files"
    if JOURNAL in held:
        what = "holds an unfinished run"
    elif MANIFEST in held:
        what = "holds a finished run"
    elif any(name.startswith("part-") for name in held):
        return (
            f"{shown}: holds parts of a run: found {listing(held)}; expected an empty folder or none. Go on with them "
            "as they were begun (--part I/N, or --ray with --resume), put them together by `lox-stream finish`, or "
            "choose another --out"
        )
    return (
        f"{shown}: {what}: found {listing(held)}; expected an empty folder or none. Go on with an unfinished run by "
        "--resume, replace an earlier output by --overwrite, or choose another --out"
    )


def _unknown(out: Path, held: Iterable[str]) -> str:
    return (
        f"{printable(out)}: cannot be repaired: found {listing(held) or 'nothing'}, expected {MANIFEST} or {JOURNAL}, "
        "which tell what was written. Start anew, with --overwrite if the folder holds an earlier output"
    )


def _content_problems(
    out: Path, held: tuple[str, ...], aligned: Checkpoint, *, resume: bool, repair: bool = False
) -> list[str]:
    """What the folder holds already must be ours, and nothing in it may lead elsewhere or be loaded instead."""
    shown = printable(out)
    ours = set(output_names(aligned))
    foreign = [name for name in held if name not in ours]
    if resume and (JOURNAL in held or repair):
        return _file_problems(out, aligned, repair=repair)  # whether it is of this run, the journal's own check says
    if resume and MANIFEST in held:
        return [
            f"{shown}: holds a finished run (found {MANIFEST}), expected an unfinished one. There is "
            "nothing to resume: use it as it is, mend it with --resume --repair, or start anew with --overwrite"
        ]
    if foreign and not (MANIFEST in held or JOURNAL in held):
        return [
            f"{shown}: holds files that this run does not write: found {listing(foreign)}, expected {MANIFEST} or "
            f"{JOURNAL} of an earlier run, or nothing but names of this one. Choose another --out"
        ]
    return foreign_weights(out, aligned) + _file_problems(out, aligned)


def _file_problems(out: Path, aligned: Checkpoint, *, repair: bool = False) -> list[str]:
    """Files that a run opens for writing must be its own, no links, which may lead to an input; and it must be able to.

    A repair writes in the shards themselves.
    """
    problems = []
    shards = {shard.name for shard in aligned.shards}
    for name in output_names(aligned):
        path = out / name
        in_work = name.endswith(PARTIAL) or name == JOURNAL
        parents = [parent for parent in path.parents if parent.is_relative_to(out) and parent != out]
        if (in_work and path.is_symlink()) or any(parent.is_symlink() for parent in parents):
            problems.append(f"{printable(path)}: is or lies behind a link, expected a file of its own. Remove the link")
        elif path.is_dir():
            problems.append(f"{printable(path)}: is a folder, expected a file or nothing. Remove it")
        elif in_work and path.exists() and path.stat().st_nlink > 1:
            problems.append(f"{printable(path)}: is a hard link to another file, expected one of its own. Remove it")
        elif (in_work or (repair and name in shards)) and path.exists() and not os.access(path, os.R_OK | os.W_OK):
            problems.append(f"{printable(path)}: no permission to read and write it. Give it: chmod u+rw")
    return problems


def _space_problems(out: Path, aligned: Checkpoint, *, resume: bool) -> list[str]:
    """Bytes still to be reserved against what the file system has, and the largest file against the process's limit."""
    shown = printable(out)
    problems = []
    needed = _needed_bytes(out, aligned, resume=resume)
    parent = nearest_folder(out)
    usage = shutil.disk_usage(parent)
    if usage.total and needed > usage.free:  # some network file systems say 0 of everything
        problems.append(
            f"{shown}: no space: expected {needed} bytes free on the file system of {printable(parent)}, "
            f"found {usage.free} ({needed - usage.free} too few). Free some, or choose another --out"
        )
    limit, largest = _file_size_limit(), max((written_bytes(shard) for shard in aligned.shards), default=0)
    if limit is not None and largest > limit:
        problems.append(
            f"{shown}: a file of {largest} bytes is needed, but this process may write {limit} at most. "
            "Raise the limit: `ulimit -f unlimited`"
        )
    return problems


def _needed_bytes(out: Path, aligned: Checkpoint, *, resume: bool) -> int:
    """What is to be allocated anew: partial files are used again, and on resume so are finished shards."""
    needed = _OVERHEAD_BYTES + 1024 * len(aligned.tensors)
    for shard in aligned.shards:
        there = [out / (shard.name + PARTIAL), *([out / shard.name] if resume else [])]
        allocated = next((path.stat().st_blocks * 512 for path in there if path.is_file()), 0)
        needed += max(0, written_bytes(shard) - allocated)
    for relative in aligned.companions:
        path = companion_path(aligned, relative)
        needed += path.stat().st_size if path.exists() else 0
    return needed


def _file_size_limit() -> int | None:
    """The largest file that this process may write (`ulimit -f`), in bytes; None without a limit."""
    import resource  # not on Windows, where this module has to be importable to say so

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
