"""A checkpoint as a catalogue: every tensor with its dtype, shape, file and byte range. Reads headers only."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_stream.companions import OWN_FILES, companion_warnings, find_companions
from lox_stream.errors import CheckpointError
from lox_stream.layout import PIPELINE_INDEX, Layout, choose_layout, read_json
from lox_stream.names import is_plain_relative, listing, printable, shown
from lox_stream.shards import DTYPE_BITS, DTYPE_BYTES, Shard, TensorInfo, read_shard
from lox_stream.torch_files import is_torch_file, read_torch_file

__all__ = ["DTYPE_BITS", "DTYPE_BYTES", "Checkpoint", "Shard", "TensorInfo", "open_checkpoint"]


@dataclass(frozen=True, slots=True)
class Overlay:
    """An adapter that lies over a whole model: what is read from its folder, and the files that it brings."""

    folder: Path
    files: tuple[Shard, ...]  # its config, all header, and its weights
    companions: tuple[Path, ...]  # relative; they take the place of the model's


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors shards, or one file, as found when it was opened.

    Of a pipeline of diffusers it holds the shards and tensors of all `components`, under names such as
    `transformer/proj.weight`; these are checkpoints with the same names, and with a config of their own.
    """

    root: Path  # what the user named, absolute: the folder or the file
    folder: Path  # the folder itself, or the file's parent
    shards: tuple[Shard, ...]  # by name
    tensors: dict[str, TensorInfo]  # all, by name
    index_name: str | None  # "model.safetensors.index.json"; None for a single file
    index: dict[str, Any] | None  # parsed
    config: dict[str, Any]  # config.json; empty without one, or when a file was given; of a pipeline its index
    companions: tuple[Path, ...]  # relative paths of the files that travel with the weights; empty for a file
    warnings: tuple[str, ...] = ()  # complete messages
    components: tuple[Checkpoint, ...] = ()  # of a pipeline
    prefix: str = ""  # of a component's names: "transformer/"
    overlay: Overlay | None = None  # then the rest is the layout of the model that it lies over
    origin: str = ""  # where it was fetched from: a name on the hub or an address; "": it lies here


def whence(checkpoint: Checkpoint) -> str:
    """What the user named."""
    return checkpoint.origin or str(checkpoint.root)


def files_of(checkpoint: Checkpoint) -> tuple[Shard, ...]:
    """The files that make a checkpoint this one and no other: its shards, or an adapter's own files."""
    return checkpoint.shards if checkpoint.overlay is None else checkpoint.overlay.files


def companion_path(checkpoint: Checkpoint, relative: Path) -> Path:
    """Where a companion lies."""
    overlay = checkpoint.overlay
    return (overlay.folder if overlay and relative in overlay.companions else checkpoint.folder) / relative


def models_in(checkpoint: Checkpoint) -> tuple[Checkpoint, ...]:
    """The components of a pipeline, or the one model that it is."""
    return checkpoint.components or (checkpoint,)


def model_of(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The component that a tensor's name belongs to, or the one model."""
    return next((model for model in checkpoint.components if name.startswith(model.prefix)), checkpoint)


def index_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The files that say that weights are there, relative, in the order in which they are written."""
    names = [model.index_name for model in models_in(checkpoint) if model.index_name is not None]
    return (*names, PIPELINE_INDEX) if checkpoint.components else tuple(names)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder or a single safetensors file; raises CheckpointError with all problems found.

    A folder with a model_index.json is a pipeline: every component that it names and that has weights is opened.

    Every header is read and checked (some 100 bytes a tensor), no weight. Links are followed; the names in an index
    may not leave the folder.
    """
    root = Path(path).absolute()
    if os.path.isfile(root / PIPELINE_INDEX):  # noqa: PTH113 - False, and no error, for a path that is too long
        opened, own = _open_pipeline(root)
    else:
        layout = choose_layout(root)
        opened, own = _open_model(root, layout)
        if not layout.is_folder:
            return opened
    found = find_companions(opened.folder, own)
    warnings = [*opened.warnings, *companion_warnings(opened.folder, found)]
    if (opened.folder / OWN_FILES[0]).exists():
        warnings.append(
            f"{printable(opened.folder)}: is itself an output of lox-stream: extrapolated twice if it is aligned"
        )
    return replace(opened, companions=found.files, warnings=tuple(warnings))


def _open_model(root: Path, layout: Layout) -> tuple[Checkpoint, set[str]]:
    """One model without its companions, and the names of its shards and index as they lie there."""
    problems: list[str] = []
    warnings = list(layout.warnings)
    shards = _read_shards(layout, problems)
    tensors = _catalogue(layout, shards, problems, warnings)
    config = _config(layout, problems)
    if problems:
        raise CheckpointError(problems)
    opened = Checkpoint(
        root, layout.folder, shards, tensors, layout.index_name, layout.index, config, (), tuple(warnings)
    )
    return opened, {*layout.shard_names, *((layout.read_from,) if layout.read_from else ())}


def _open_pipeline(root: Path) -> tuple[Checkpoint, set[str]]:
    """All components with weights as one checkpoint, and the names of their shards and indexes, and its own."""
    said = read_json(root / PIPELINE_INDEX)
    problems: list[str] = []
    components, own = [], {PIPELINE_INDEX}
    for name in sorted(name for name in said if _is_folder_name(name) and _has_weights(root / name)):
        if not isinstance(said[name], list):
            problems.append(
                f"{printable(root / PIPELINE_INDEX)}: {printable(name)} is {shown(said[name])}, and there is a folder "
                "of that name with weights; expected [library, class]. Download the file again"
            )
            continue
        try:
            opened, files = _open_model(root / name, choose_layout(root / name))
        except CheckpointError as error:
            problems += error.problems
            continue
        components.append(_prefixed(opened, f"{name}/"))
        own |= {f"{name}/{file}" for file in files}
    if not components and not problems:
        problems.append(
            f"{printable(root / PIPELINE_INDEX)}: names no folder here that holds weights, expected such as "
            "transformer/ or unet/. Download the pipeline again"
        )
    if problems:
        raise CheckpointError(problems)
    shards = tuple(shard for model in components for shard in model.shards)
    tensors = {name: tensor for model in components for name, tensor in model.tensors.items()}
    warnings = tuple(warning for model in components for warning in model.warnings)
    return Checkpoint(root, root, shards, tensors, None, None, said, (), warnings, tuple(components)), own


def _is_folder_name(name: str) -> bool:
    return is_plain_relative(name) and "/" not in name


def _has_weights(folder: Path) -> bool:
    """Whether there may be weights; of a folder that cannot be listed, who opens it says why."""
    try:
        return folder.is_dir() and any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
    except OSError:
        return os.path.lexists(folder)


def _prefixed(model: Checkpoint, prefix: str) -> Checkpoint:
    """A component under the names that it has in its pipeline."""
    shards = tuple(
        replace(
            shard,
            name=prefix + shard.name,
            tensors=tuple(replace(tensor, name=prefix + tensor.name) for tensor in shard.tensors),
        )
        for shard in model.shards
    )
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    index_name = None if model.index_name is None else prefix + model.index_name
    return replace(model, shards=shards, tensors=tensors, index_name=index_name, prefix=prefix)


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
