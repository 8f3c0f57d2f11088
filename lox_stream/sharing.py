"""One run on several machines: which files of the output each part writes, in a folder of its own, `part-2-of-8`.

A part is an output like any other, with its own journal, lock, checksums and manifest, but without an index, so that
nothing can be loaded before all parts are there and `finish` has put them together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lox_stream.checkpoint import Checkpoint
from lox_stream.matching import Step, rescaled
from lox_stream.names import printable
from lox_stream.options import Options
from lox_stream.output_rules import is_new
from lox_stream.shards import Shard, written_bytes

FOLDER = re.compile(r"part-(\d+)-of-(\d+)")


def numbers_of(part: str) -> tuple[int, int]:
    """(2, 8) of "2/8"."""
    number, _, count = part.partition("/")
    return int(number), int(count)


def folder_of_part(out: Path, part: str) -> Path:
    """Where a part is written; the folder itself for the whole, which is the part ""."""
    if not part:
        return out
    number, count = numbers_of(part)
    return out / f"part-{number}-of-{count}"


def own_share(written: Checkpoint, steps: Sequence[Step], part: str) -> tuple[Checkpoint, tuple[Step, ...]]:
    """The files of the output that a part writes, and their steps.

    The same for whoever asks: files by size, the largest first, each to the part that has the least. Files that share a
    weight of FP8 and its scales, which are made at once, go to one part.
    """
    number, count = numbers_of(part)
    groups = _together(written, steps)
    groups.sort(key=lambda group: (-sum(written_bytes(shard) for shard in group), group[0].name))
    loads = [0] * count
    mine: list[Shard] = []
    for group in groups:
        least = loads.index(min(loads))
        loads[least] += sum(written_bytes(shard) for shard in group)
        if least == number - 1:
            mine += group
    names = {shard.name for shard in mine}
    shards = tuple(shard for shard in written.shards if shard.name in names)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    share = replace(written, shards=shards, tensors=tensors, index_name=None, index=None, companions=(), components=())
    return share, tuple(step for step in steps if step.name in tensors)


def most_parts(written: Checkpoint, steps: Sequence[Step]) -> int:
    """Into how many parts the output can be taken apart with none of them empty."""
    return len(_together(written, steps))


def _together(written: Checkpoint, steps: Sequence[Step]) -> list[list[Shard]]:
    """The files that have to go to one part."""
    home = {tensor.name: shard.name for shard in written.shards for tensor in shard.tensors}
    leader = {shard.name: shard.name for shard in written.shards}

    def found(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for step in steps:
        if step.scaled is not None and rescaled(step):
            leader[found(home[step.scaled.scale.name])] = found(home[step.name])
    groups: dict[str, list[Shard]] = {}
    for shard in written.shards:
        groups.setdefault(found(shard.name), []).append(shard)
    return list(groups.values())


def part_problems(written: Checkpoint, options: Options) -> list[str]:
    """What a part cannot be of."""
    _, count = numbers_of(options.part)
    asked = f"--part is {options.part}"
    if options.form != "weights":
        return [f"{asked}, which is of the files of a model; expected none for an adapter, which is one file"]
    if count > len(written.shards):
        return [
            f"{asked}, and the output has {len(written.shards)} files, which are not split; expected at most so many "
            "parts. Have more files with --max-shard-size"
        ]
    return []


def place_problems(out: Path, part: str) -> list[str]:
    """What else a folder holds that is to get a part."""
    _, count = numbers_of(part)
    if not is_new(out):
        return [
            f"{printable(out)}: holds an output or a run of the whole, perhaps of parts that were put together; "
            "expected nothing but parts. It is done, or choose another --out"
        ]
    return count_problems(out, count, f"--part is {part}")


def count_problems(out: Path, count: int, asked: str) -> list[str]:
    """That a folder holds parts of another number than is asked for."""
    others = {int(found[2]) for found in _parts_in(out)} - {count}
    if not others:
        return []
    return [
        f"{printable(out)}: holds parts of {', '.join(map(str, sorted(others)))}, and {asked}; expected one number of "
        "parts. Choose another --out"
    ]


def begun_in_parts(out: Path) -> bool:
    """Whether a folder holds parts of a run."""
    return bool(_parts_in(out))


def _parts_in(out: Path) -> list[re.Match[str]]:
    places = [path.name for path in out.glob("part-*")] if out.is_dir() else []
    return [found for name in places if (found := FOLDER.fullmatch(name))]
