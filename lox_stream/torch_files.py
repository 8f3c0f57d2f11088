"""One file of `torch.save` as safetensors would have it: tensors as byte ranges. No torch, and no code of it is run.

Such a file is a zip archive that holds each storage as it is in memory, and a pickle that says which tensor is which
part of which storage (`pickles`).
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from lox_stream.errors import CheckpointError
from lox_stream.names import printable
from lox_stream.pickles import MAX_BYTES, RefusedError, StoredTensor, read_pickle
from lox_stream.shards import DTYPE_BYTES, Shard, TensorInfo, disguise, header_of, require_regular, unreadable

INDEX_SUFFIX = ".bin.index.json"
ORDER_BYTES = 16
DAMAGED = (  # what zipfile raises for bytes that are no archive
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, LookupError, OverflowError, RuntimeError),
)
CONVERT = "Load it with torch yourself if you trust its source, and save it as safetensors"


def safetensors_name(name: str) -> str:
    """What the output calls a file.

    >>> safetensors_name("pytorch_model-00001-of-00002.bin"), safetensors_name("pytorch_model.bin.index.json")
    ('model-00001-of-00002.safetensors', 'model.safetensors.index.json')
    """
    return re.sub(r"\.(bin|pt|pth)(?=$|\.index\.json$)", ".safetensors", name.removeprefix("pytorch_"))


def is_torch_file(name: str) -> bool:
    """Whether a file's name is one that `torch.save` is given."""
    return name.endswith((".bin", ".pt", ".pth"))


def read_torch_file(path: Path, name: str | None = None) -> Shard:
    """The tensors of a file; the header is the one that its safetensors form has. Raises CheckpointError."""
    try:
        real = path.resolve(strict=True)
        require_regular(path, real.stat())
        with real.open("rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(32)
            if not head.startswith(b"PK\x03\x04"):
                known = disguise(head) or "it is no zip file, as torch.save has written since version 1.6"
                raise CheckpointError([f"{printable(path)}: is not a file that can be mapped: {known}. {CONVERT}"])
            found, starts = _contents(path, file, status.st_size)
    except (OSError, RuntimeError) as error:
        raise CheckpointError([unreadable(path, error)]) from error
    header, infos = _as_safetensors(path, real, found, starts)
    digest = xxhash.xxh3_128_hexdigest(header)
    size = len(header) + sum(info.n_bytes for info in infos)
    found_as = name or path.name
    return Shard(
        safetensors_name(found_as), real, status.st_size, status.st_mtime_ns, header, digest, infos, size, found_as
    )


def _contents(
    path: Path, file: IO[bytes], size_bytes: int
) -> tuple[dict[str, StoredTensor], dict[str, tuple[int, int]]]:
    """The tensors by name, and (offset in the file, bytes) of each storage."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            pickles = [member for member in members if member.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or pickles[0].file_size > MAX_BYTES:
                raise CheckpointError([f"{printable(path)}: holds no data.pkl as torch.save writes it. {CONVERT}"])
            root = pickles[0].filename.removesuffix("data.pkl")
            order = next((member for member in members if member.filename == f"{root}byteorder"), None)
            if order is not None and archive.open(order).read(ORDER_BYTES).strip() != b"little":
                raise CheckpointError([f"{printable(path)}: its numbers are not little-endian. {CONVERT}"])
            with archive.open(pickles[0]) as data:
                found = _tensors(path, data)
        starts = {}
        for member in members:
            if member.filename.startswith(f"{root}data/"):
                starts[member.filename.removeprefix(f"{root}data/")] = _range(path, file, member, size_bytes)
        return found, starts
    except DAMAGED as error:
        raise CheckpointError(
            [f"{printable(path)}: is damaged or cut: {printable(str(error))}. Download it again"]
        ) from error


def _range(path: Path, file: IO[bytes], member: zipfile.ZipInfo, size_bytes: int) -> tuple[int, int]:
    """Where a member's bytes lie in the file, behind its local header."""
    file.seek(member.header_offset)
    local = file.read(30)
    start = member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if member.compress_type != zipfile.ZIP_STORED or start + member.file_size > size_bytes or len(local) < 30:
        raise CheckpointError([f"{printable(path)}: {printable(member.filename)} is compressed or cut. {CONVERT}"])
    return start, member.file_size


def _tensors(path: Path, data: IO[bytes]) -> dict[str, StoredTensor]:
    try:
        return read_pickle(data)
    except RefusedError as error:
        raise CheckpointError(
            [f"{printable(path)}: its pickle is refused: {printable(str(error))}. {CONVERT}"]
        ) from error


def _as_safetensors(
    path: Path, real: Path, found: Mapping[str, StoredTensor], starts: Mapping[str, tuple[int, int]]
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header of the safetensors form, tensors by name in it, and where each lies here and there."""
    problems: list[str] = []
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name in sorted(found):
        tensor = found[name]
        size = DTYPE_BYTES[tensor.dtype]
        problem = _tensor_problem(tensor, size, starts.get(tensor.key))
        if problem:
            problems.append(f"{printable(path)}: {printable(name)}: {problem}. {CONVERT}")
            continue
        n_bytes = math.prod(tensor.shape) * size
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    if problems:
        raise CheckpointError(problems)
    header = header_of(entries, None)
    infos = []
    for name, entry in entries.items():
        tensor, (begin, end) = found[name], entry["data_offsets"]
        start = starts[tensor.key][0] + tensor.first * DTYPE_BYTES[tensor.dtype]
        place = len(header) + begin
        infos.append(TensorInfo(name, tensor.dtype, tensor.shape, real, start, end - begin, place))
    return header, tuple(infos)


def _tensor_problem(tensor: StoredTensor, size: int, storage: tuple[int, int] | None) -> str:
    steps = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    apart = any(n > 1 and stride != step for n, stride, step in zip(tensor.shape, tensor.stride, steps, strict=True))
    if math.prod(tensor.shape) and apart:
        return f"its elements are not in a row (shape {tensor.shape}, strides {tensor.stride})"
    if storage is None or (tensor.first + math.prod(tensor.shape)) * size > storage[1]:
        return "it reaches beyond its storage, or that is missing"
    return ""
