"""The files that travel with a checkpoint's weights: config, tokenizer, chat template, licences, remote code."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lox_stream.names import listing, printable
from lox_stream.shards import disguise, unreadable

OWN_FILES = ("lox_stream.json", "lox_stream.journal")  # manifest and journal of a run; not part of the model

_WEIGHTS = "bin|pt|pth|ckpt|h5|hdf5|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|npz|npy|pkl|pickle|pdparams|mar|nemo"
_LEFTOVERS = "partial|incomplete|lock|tmp|pyc|swp"
_LEFT_OUT = re.compile(rf".*\.({_WEIGHTS}|{_LEFTOVERS})(\.index\.json)?", re.IGNORECASE)
_SAFETENSORS = re.compile(r".*\.safetensors(\.index(\.[\w-]+)?\.json)?", re.IGNORECASE)
CACHE_FOLDERS = re.compile(r"\..*|__pycache__|__MACOSX|wandb|lost\+found|(checkpoint|global_step)[-_]?\d+")


@dataclass(frozen=True, slots=True)
class Companions:
    """What lies in a checkpoint's folder beside its weights; all paths relative to the folder."""

    files: tuple[Path, ...]  # to be copied; a link that leads nowhere is among them, and a folder that cannot be listed
    other_weights: tuple[Path, ...]  # safetensors files that are no part of the checkpoint
    left_out_links: tuple[Path, ...]  # links to folders elsewhere, which are not followed


def find_companions(folder: Path, weights: Collection[str]) -> Companions:
    """Look through the folder and its sub-folders; `weights` are the names of the checkpoint's own shards and index.

    Left out are weights of other formats with their indexes, hidden files, caches, a trainer's saved steps, and files
    of lox-stream itself. Links to files are followed, links to folders only where they stay inside the folder.
    """
    inside = folder.resolve()
    files, other_weights, left_out_links = [], [], []
    unlisted: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unlisted.append, followlinks=True):
        for name in sorted(folders):
            path = Path(parent, name)
            if CACHE_FOLDERS.fullmatch(name):
                folders.remove(name)
            elif path.is_symlink() and not _may_follow(path, folder, inside):
                folders.remove(name)
                left_out_links.append(path.relative_to(folder))
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder)
            if relative.as_posix() in weights or name.startswith(".") or relative.as_posix() in OWN_FILES:
                continue
            if _SAFETENSORS.fullmatch(name):
                other_weights.append(relative)
            elif not _LEFT_OUT.fullmatch(name) and (path.is_file() or (path.is_symlink() and not path.exists())):
                files.append(relative)
    files += [Path(error.filename).relative_to(folder) for error in unlisted]
    return Companions(tuple(sorted(files)), tuple(sorted(other_weights)), tuple(sorted(left_out_links)))


def companion_problems(files: Collection[Path]) -> list[str]:
    """The files that could not be copied as they should: no permission, a link to nowhere, a git-lfs pointer."""
    problems = []
    for path in files:
        try:
            with path.open("rb") as file:
                head = file.read(32)
        except OSError as error:
            problems.append(unreadable(path, error))
            continue
        if head.startswith(b"version https://git-lfs"):
            problems.append(f"{printable(path)}: {disguise(head)}")
    return problems


def companion_warnings(folder: Path, companions: Companions) -> list[str]:
    """What a person should know of what is copied and what is not."""
    warnings = []
    if companions.other_weights:
        warnings.append(
            f"{printable(folder)}: not copied, since they are no part of the checkpoint: "
            f"{listing(map(str, companions.other_weights))}; a file of weights is run on by itself to change it too, "
            "and shards with their index in a folder of their own"
        )
    code = [path for path in companions.files if path.suffix == ".py"]
    if code:
        warnings.append(
            f"{printable(folder)}: brings code of its own, which is copied as data and not run here: "
            f"{listing(map(str, code))}. Who loads the output with trust_remote_code runs it: read it first"
        )
    if companions.left_out_links:
        warnings.append(
            f"{printable(folder)}: not copied, since they are links to folders elsewhere: "
            f"{listing(map(str, companions.left_out_links))}"
        )
    for relative in companions.files:
        path = folder / relative
        if path.is_symlink() and path.exists() and not _is_expected_link(path, folder.resolve()):
            warnings.append(
                f"{printable(path)}: is a link to {printable(path.resolve())}; the output gets a copy of it"
            )
    return warnings


def _may_follow(link: Path, folder: Path, inside: Path) -> bool:
    """Whether a link to a folder stays inside and is not reached through another one: so no walk is endless."""
    return link.resolve().is_relative_to(inside) and link.parent.resolve() == inside / link.parent.relative_to(folder)


def _is_expected_link(path: Path, inside: Path) -> bool:
    """A link within the folder, or as the hub's cache makes them: `snapshots/REVISION/NAME -> ../../blobs/HASH`."""
    target = path.resolve()
    return target.is_relative_to(inside) or target.parent.name == "blobs"
