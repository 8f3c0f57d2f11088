"""A checkpoint as a catalogue: every tensor with its dtype, shape, file and byte range. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_stream.companions import OWN_FILES, companion_warnings, find_companions
from lox_stream.errors import CheckpointError
from lox_stream.layout import Layout, choose_layout, read_json
from lox_stream.names import listing, printable
from lox_stream.shards import DTYPE_BITS, DTYPE_BYTES, Shard, TensorInfo, read_shard
from lox_stream.torch_files import is_torch_file, read_torch_file

__all__ = ["DTYPE_BITS", "DTYPE_BYTES", "Checkpoint", "Shard", "TensorInfo", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors shards, or one file, as found when it was opened."""

    root: Path  # what the user named, absolute: the folder or the file
    folder: Path  # the folder itself, or the file's parent
    shards: tuple[Shard, ...]  # by name
    tensors: dict[str, TensorInfo]  # all, by name
    index_name: str | None  # "model.safetensors.index.json"; None for a single file
    index: dict[str, Any] | None  # parsed
    config: dict[str, Any]  # config.json; empty without one, or when a file was given
    companions: tuple[Path, ...]  # relative paths of the files that travel with the weights; empty for a file
    warnings: tuple[str, ...] = ()  # complete messages


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder or a single safetensors file; raises CheckpointError with all problems found.

    Every header is read and checked (some 100 bytes a tensor), no weight. Links are followed; the names in an index
    may not leave the folder.
    """
    root = Path(path).absolute()
    problems: list[str] = []
    layout = choose_layout(root)
    warnings = list(layout.warnings)
    shards = _read_shards(layout, problems)
    tensors = _catalogue(layout, shards, problems, warnings)
    config = _config(layout, problems)
    companions: tuple[Path, ...] = ()
    if layout.is_folder:
        own = {*layout.shard_names, *((layout.read_from,) if layout.read_from else ())}
        found = find_companions(layout.folder, own)
        companions = found.files
        warnings += companion_warnings(layout.folder, found)
        if (layout.folder / OWN_FILES[0]).exists():
            warnings.append(
                f"{printable(layout.folder)}: is itself an output of lox-stream: extrapolated twice if it is aligned"
            )
    if problems:
        raise CheckpointError(problems)
    return Checkpoint(
        root, layout.folder, shards, tensors, layout.index_name, layout.index, config, companions, tuple(warnings)
    )


def _read_shards(layout: Layout, problems: list[str]) -> tuple[Shard, ...]:
    """Every shard that can be read; the others become problems."""
    shards = []
    for name in layout.shard_names:
        try:
            read = read_torch_file if is_torch_file(name) else read_shard
            shards.append(read(layout.folder / name, name))
        except CheckpointError as error:
            problems += error.problems
    return tuple(shards)


def _catalogue(
    layout: Layout, shards: tuple[Shard, ...], problems: list[str], warnings: list[str]
) -> dict[str, TensorInfo]:
    """All tensors by name, held against the index."""
    tensors: dict[str, TensorInfo] = {}
    homes: dict[str, list[str]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            tensors[tensor.name] = tensor
            homes.setdefault(tensor.name, []).append(shard.name)
    for name, found in homes.items():
        if len(found) > 1:
            places = " and in ".join(map(printable, found))
            problems.append(
                f"{printable(layout.folder)}: {printable(name)} is in {places}, expected it once. "
                "Save or download the checkpoint again"
            )
    if layout.index is not None:
        _hold_against_index(layout, layout.index["weight_map"], homes, {shard.name for shard in shards}, problems)
        unnamed = [name for name in tensors if name not in layout.index["weight_map"]]
        if unnamed:
            warnings.append(
                f"{printable(layout.folder / str(layout.index_name))}: does not name {listing(unnamed)}, "
                "found in the shards; treated like the others"
            )
    return tensors


def _hold_against_index(
    layout: Layout, weight_map: dict[str, str], homes: dict[str, list[str]], readable: set[str], problems: list[str]
) -> None:
    for name, shard_name in weight_map.items():
        if shard_name in readable and shard_name not in homes.get(name, ()):
            found = f"it is in {printable(homes[name][0])}" if name in homes else "it is in no shard that can be read"
            problems.append(
                f"{printable(layout.folder / str(layout.index_name))}: names {printable(name)} in "
                f"{printable(shard_name)}, but {found}. Index and shards are of different downloads: "
                "download both again"
            )


def _config(layout: Layout, problems: list[str]) -> dict[str, Any]:
    path = layout.folder / "config.json"
    if not layout.is_folder or not (path.exists() or path.is_symlink()):
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        problems += error.problems
        return {}
