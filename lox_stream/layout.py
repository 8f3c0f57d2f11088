"""Which files of a folder are the checkpoint: one weights file, or an index and the shards that it names."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_stream.companions import OWN_FILES
from lox_stream.errors import CheckpointError
from lox_stream.names import is_plain_relative, listing, printable, shown
from lox_stream.shards import disguise, parse_json, unreadable
from lox_stream.torch_files import INDEX_SUFFIX as INDEX_OF_TORCH
from lox_stream.torch_files import safetensors_name

JOURNAL = OWN_FILES[1]
INDEX_SUFFIX = ".safetensors.index.json"
_VARIANT_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")  # of the variant fp16: index.fp16.json
PIPELINE_INDEX = "model_index.json"  # of a folder of diffusers, whose components lie in folders of their own
_STEMS = ("model", "diffusion_pytorch_model")  # in this order, as transformers and diffusers look
TORCH_FILE = "pytorch_model.bin"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


def is_index(name: str) -> bool:
    """Whether a file names the safetensors shards of a model, or of a variant of it, or the folders of a pipeline."""
    return name == PIPELINE_INDEX or _VARIANT_INDEX.search(name) is not None


def stem_of(name: str) -> str:
    """What the files of a model are called, out of the name of one of them, without its variant.

    >>> stem_of("model.safetensors.index.fp16.json"), stem_of("unet/diffusion_pytorch_model.fp16.safetensors")
    ('model', 'unet/diffusion_pytorch_model')
    """
    stem = _VARIANT_INDEX.sub("", name).removesuffix(".safetensors")
    plain = stem.rpartition(".")[0]
    return plain if plain.rpartition("/")[2] in _STEMS else stem


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that make up a checkpoint, before any of the shards was opened."""

    folder: Path
    is_folder: bool  # False: the user named one file
    shard_names: tuple[str, ...]  # relative to the folder, sorted
    index_name: str | None = None  # of the output's
    index: dict[str, Any] | None = None  # with the names that shards have in the output
    read_from: str | None = None  # the file that the index was read from
    warnings: tuple[str, ...] = ()


def choose_layout(root: Path) -> Layout:
    """Find the checkpoint at a path; raises CheckpointError when there is none, or more than one."""
    try:
        if root.is_dir():
            names = sorted(path.name for path in root.iterdir())
            return _folder_layout(root, names)
        if root.is_file():
            return _file_layout(root)
        root.stat()
    except FileNotFoundError as error:
        raise CheckpointError([_missing(root)]) from error
    except OSError as error:
        raise CheckpointError([unreadable(root, error)]) from error
    raise CheckpointError([f"{printable(root)}: is a device, pipe or socket, expected a folder or a safetensors file"])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError."""
    try:
        if not path.is_file() and path.exists():
            raise CheckpointError([f"{printable(path)}: is not a file, expected a JSON file"])
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError([unreadable(path, error)]) from error
    try:
        value, repeated = parse_json(data)
    except ValueError as error:
        reason = disguise(data[:32]) or f"{error}. Download it again"
        raise CheckpointError([f"{printable(path)}: is not JSON: {reason}"]) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            [f"{printable(path)}: holds a {type(value).__name__}, expected a JSON object. Download it again"]
        )
    if repeated:
        raise CheckpointError(
            [f"{printable(path)}: names twice: {listing(repeated)}; expected each name once. Correct the file"]
        )
    return value


def _file_layout(path: Path) -> Layout:
    if _VARIANT_INDEX.search(path.name):
        raise CheckpointError(
            [f"{printable(path)}: is an index, expected weights. Give the folder instead: {path.parent}"]
        )
    return Layout(path.parent, False, (path.name,))


def _folder_layout(folder: Path, names: list[str]) -> Layout:
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    indexes = [name for name in names if _VARIANT_INDEX.search(name) and not name.startswith(".")]
    for stem in _STEMS:
        single, index_name = f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}"
        if single in weights:
            return _single_layout(folder, single, index_name if index_name in indexes else None)
        if index_name in indexes:
            return _index_layout(folder, index_name, weights)
    if not weights and not indexes:
        found = _torch_layout(folder, names)
        if found is not None:
            return found
    if len(indexes) == 1:
        return _index_layout(folder, indexes[0], weights)
    if not indexes and len(weights) == 1:
        return _single_layout(folder, weights[0], None)
    if indexes or weights:
        raise CheckpointError([_ambiguous(folder, indexes, weights)])
    raise CheckpointError([_no_weights(folder, names)])


def _single_layout(folder: Path, name: str, index_name: str | None) -> Layout:
    """A folder with one weights file; an index beside it counts only if it names that file and no other."""
    if name.startswith("adapter_model"):
        raise CheckpointError(
            [
                f"{printable(folder)}: holds a PEFT adapter ({printable(name)}), expected a whole model. Give it as "
                "--aligned, with the model that it was trained on as --base; or merge it first (peft: "
                "`model.merge_and_unload()`)"
            ]
        )
    if index_name is None:
        return Layout(folder, True, (name,))
    index = read_json(folder / index_name)
    weight_map = index.get("weight_map")
    if isinstance(weight_map, dict) and weight_map and all(shard == name for shard in weight_map.values()):
        return Layout(folder, True, (name,), index_name, index, index_name)
    warning = f"holds {name} and {index_name}; {name} is used, as transformers does, and the index is not"
    return Layout(folder, True, (name,), warnings=(f"{printable(folder)}: {warning}",))


def _torch_layout(folder: Path, names: list[str]) -> Layout | None:
    """As transformers looks where there is nothing better: one file of torch, or an index of several."""
    if TORCH_FILE in names:
        return Layout(folder, True, (TORCH_FILE,))
    index_name = "pytorch_model" + INDEX_OF_TORCH
    if index_name not in names:
        return None
    found = _index_layout(folder, index_name, [])
    assert found.index is not None, "it was read"
    weight_map = {name: safetensors_name(shard) for name, shard in found.index["weight_map"].items()}
    index = found.index | {"weight_map": weight_map}
    return Layout(folder, True, found.shard_names, safetensors_name(index_name), index, index_name)


def _index_layout(folder: Path, index_name: str, weights: list[str]) -> Layout:
    path = folder / index_name
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "none" if weight_map is None else f"{shown(weight_map, 60)}"
        raise CheckpointError(
            [f"{printable(path)}: weight_map is {found}, expected {{tensor: shard, ...}}. Download it again"]
        )
    if not all(isinstance(name, str) for name in weight_map.values()):
        found = "values that are no file names"
        raise CheckpointError(
            [f"{printable(path)}: weight_map has {found}, expected {{tensor: shard, ...}}. Download it again"]
        )
    named = tuple(dict.fromkeys(weight_map.values()))
    problems = [problem for name in named if (problem := _shard_name_problem(path, name))]
    if problems:
        raise CheckpointError(problems)
    families = {family for name in named if (family := _numbered_family(name))}
    unnamed = [name for name in weights if name not in named and _numbered_family(name) in families]  # no tensor in it
    return Layout(folder, True, tuple(sorted([*named, *unnamed])), index_name, index, index_name)


def _shard_name_problem(path: Path, name: str) -> str | None:
    if not is_plain_relative(name):
        return (
            f"{printable(path)}: names the shard {printable(name)!r}, which leads outside of the folder or is no plain "
            "name; expected such as model-00001-of-00002.safetensors. Do not trust this checkpoint before you know why"
        )
    ending = ".bin" if path.name.endswith(INDEX_OF_TORCH) else ".safetensors"
    if not name.endswith(ending):
        return f"{printable(path)}: names the shard {printable(name)!r}, expected *{ending}. Convert the model first"
    return None


def _numbered_family(name: str) -> tuple[str, str] | None:
    """The stem and the total of `stem-00001-of-00003.safetensors`."""
    found = re.fullmatch(r"(.+)-\d+-of-(\d+)\.safetensors", name)
    return (found[1], found[2]) if found else None


def _missing(root: Path) -> str:
    if root.is_symlink():
        return unreadable(root, FileNotFoundError())
    try:
        beside = sorted(path.name for path in root.parent.iterdir())
    except OSError:
        return f"{printable(root)}: no such file or folder, nor is there {root.parent}. Correct the path"
    near = difflib.get_close_matches(root.name, beside, n=3)
    hint = f"Beside it: {listing(near)}" if near else "Correct the path"
    return f"{printable(root)}: no such file or folder. {hint}; a model on the hub is called org/name"


def _ambiguous(folder: Path, indexes: list[str], weights: list[str]) -> str:
    if not indexes and any(_numbered_family(name) for name in weights):
        return (
            f"{printable(folder)}: the index is missing: found {listing(weights)}, expected model{INDEX_SUFFIX} beside "
            "them. Download it too"
        )
    return (
        f"{printable(folder)}: more than one checkpoint: found {listing(indexes or weights)}, expected "
        f"model.safetensors or model{INDEX_SUFFIX}. Give one of the files instead of the folder, "
        "or move the others away"
    )


def _no_weights(folder: Path, names: list[str]) -> str:
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    expected = f"expected model.safetensors or model{INDEX_SUFFIX}"
    if JOURNAL in names:
        return f"{printable(folder)}: is an unfinished output of lox-stream, {expected}. Finish it first with --resume"
    if others:
        how = "from_pretrained(DIR, gguf_file=NAME)" if others[0].endswith(".gguf") else "from_pretrained(DIR)"
        return (
            f"{printable(folder)}: no safetensors weights: found {listing(others)}, {expected}. Convert them first "
            f"(transformers: {how}, then save_pretrained(NEW))"
        )
    inner = [name for name in names if any(child.is_file() for child in (folder / name).glob("*.safetensors"))]
    if inner:
        return (
            f"{printable(folder)}: no weights here, but in its folders {listing(inner)}; {expected}. Give one of these"
        )
    found = listing(names) if names else "an empty folder"
    return f"{printable(folder)}: no weights: found {found}, {expected}. Correct the path, or download the model again"
