"""One safetensors file: its header read and checked, its tensors as byte ranges. No weight is touched."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import xxhash
from safetensors import SafetensorError, safe_open

from lox_stream.errors import CheckpointError
from lox_stream.names import listing, printable, shown

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
DTYPE_BYTES: dict[str, int] = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

_AGAIN = "Download or copy it again"
_DISGUISES = (
    (b"version https://git-lfs", "it is a git-lfs pointer and not the file itself. Run `git lfs pull` in its folder"),
    (b"PK\x03\x04", "it is a zip file, as torch.save writes. Convert it to safetensors first"),
    (b"\x80\x02", "it is a pickle, as old torch.save writes. Convert it to safetensors first"),
    (
        b"GGUF",
        "it is a GGUF file. Get the safetensors version, or de-quantise it: transformers: from_pretrained(FOLDER, "
        "gguf_file=NAME), then save_pretrained(NEW)",
    ),
    (b"<", "it is a web page or XML, not weights. The download failed: download it again"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, in row-major order."""

    name: str
    dtype: str  # as safetensors names it: "BF16"
    shape: tuple[int, ...]
    path: Path  # the real file, links resolved
    start: int  # offset of its first byte in the file, header included
    n_bytes: int
    place: int | None = None  # that offset in the safetensors file which is written; None: the same


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file as found on disk, or one of torch (`torch_files`) that is written as safetensors."""

    name: str  # as the index spells it: "model-00001-of-00002.safetensors"; that of the output
    path: Path  # the real file, links resolved
    size_bytes: int
    mtime_ns: int
    header: bytes  # the 8-byte length and the JSON, as in the file that is written
    header_hash: str  # xxh3_128 of `header`, hexadecimal
    tensors: tuple[TensorInfo, ...]  # by offset
    written_bytes: int | None = None  # size of the safetensors file which is written; None: the same
    read_as: str | None = None  # its name as found; None: the same


def read_shard(path: Path, name: str | None = None) -> Shard:
    """Read and check the header of a safetensors file; raises CheckpointError with all that is wrong in it."""
    try:
        real = path.resolve(strict=True)
        require_regular(path, real.stat())
        with real.open("rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(32)
            n_header = _header_length(path, head, status.st_size)
            file.seek(0)
            header = file.read(8 + n_header)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError([unreadable(path, error)]) from error
    entries = _parse_header(path, header[8:])
    tensors = _tensors(path, real, entries, len(header), status.st_size)
    _ask_safetensors(path, real)
    digest = xxhash.xxh3_128_hexdigest(header)
    return Shard(name or path.name, real, status.st_size, status.st_mtime_ns, header, digest, tensors)


def source_name(shard: Shard) -> str:
    """The name that a shard was read by: "pytorch_model.bin"."""
    return shard.name if shard.read_as is None else shard.read_as


def written_bytes(shard: Shard) -> int:
    """Size of the file that is written for a shard."""
    return shard.size_bytes if shard.written_bytes is None else shard.written_bytes


def header_of(entries: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str] | None) -> bytes:
    """A header, its length in front: entries with dtype, shape and data_offsets by name; padded to 8 bytes."""
    text = json.dumps({"__metadata__": metadata or {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def written_start(tensor: TensorInfo) -> int:
    """Offset of a tensor's first byte in the file that is written."""
    return tensor.start if tensor.place is None else tensor.place


def parse_json(data: bytes) -> tuple[Any, tuple[str, ...]]:
    """The value and the keys that occur twice in one object; raises ValueError for anything but UTF-8 JSON."""
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=collect), tuple(repeated)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unreadable(path: Path, error: Exception) -> str:
    """The problem of a file that the system did not let us read."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"{printable(path)}: is a link to {printable(path.readlink())}, which does not exist. {_AGAIN}"
    if isinstance(error, FileNotFoundError):
        return f"{printable(path)}: no such file. {_AGAIN}, or correct the path"
    if isinstance(error, PermissionError):
        return f"{printable(path)}: no permission to read it. Change its permissions (chmod u+r) or run as its owner"
    reason = error.strerror if isinstance(error, OSError) else error
    return f"{printable(path)}: cannot be read: {reason}"


def disguise(head: bytes) -> str | None:
    """What a file is when its first bytes are of no safetensors file and of no JSON, with the way out."""
    return next((text for magic, text in _DISGUISES if head.startswith(magic)), None)


def is_regular(path: Path) -> bool:
    """Whether a path leads to a plain file: a pipe or a device would be waited for, or read for ever."""
    return stat.S_ISREG(path.stat().st_mode)


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise CheckpointError for what is no plain file."""
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise CheckpointError([f"{printable(path)}: is {kind}, expected a file of weights"])


def _header_length(path: Path, head: bytes, size_bytes: int) -> int:
    """Bytes of the JSON header, from the first bytes of the file."""
    if size_bytes == 0:
        raise CheckpointError([f"{printable(path)}: is empty (0 bytes), expected a safetensors file. {_AGAIN}"])
    n_header = int.from_bytes(head[:8], "little")
    if 8 + n_header > size_bytes and head[8:9] != b"{" and (known := disguise(head)):
        raise CheckpointError([f"{printable(path)}: is not a safetensors file: {known}"])
    if size_bytes < 10 or n_header < 2 or not (head[8:9] == b"{" or head[8:9].isspace()):
        found = head[:9].hex(" ")
        raise CheckpointError(
            [f"{printable(path)}: no safetensors header: found bytes {found}, expected a length and `{{`. {_AGAIN}"]
        )
    if n_header > MAX_HEADER_BYTES:
        raise CheckpointError(
            [f"{printable(path)}: its header would be {n_header} bytes, expected at most {MAX_HEADER_BYTES}. {_AGAIN}"]
        )
    if 8 + n_header > size_bytes:
        raise CheckpointError(
            [
                f"{printable(path)}: truncated in its header: expected at least {8 + n_header} bytes, "
                f"found {size_bytes}. The download was cut: download it again"
            ]
        )
    return n_header


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        entries, repeated = parse_json(data)
    except ValueError as error:
        raise CheckpointError([f"{printable(path)}: its header is not JSON: {error}. {_AGAIN}"]) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            [f"{printable(path)}: its header is a {type(entries).__name__}, expected an object. {_AGAIN}"]
        )
    if repeated:
        raise CheckpointError(
            [
                f"{printable(path)}: its header names twice: {listing(repeated)}; expected each name once. "
                "Save the file again"
            ]
        )
    entries.pop("__metadata__", None)
    return entries


def _tensors(path: Path, real: Path, entries: dict[str, Any], offset: int, size_bytes: int) -> tuple[TensorInfo, ...]:
    """The tensors by offset; together they must cover the file from `offset` to its end."""
    problems = [problem for name, entry in entries.items() if (problem := _entry_problem(path, name, entry))]
    if problems:
        raise CheckpointError(problems)
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), real, offset + begin, end - begin))
    end = max((tensor.start + tensor.n_bytes for tensor in tensors), default=offset)
    problems = _gaps(path, tensors, offset)
    if end > size_bytes:
        problems.append(
            f"{printable(path)}: truncated: expected {end} bytes, found {size_bytes} ({end - size_bytes} are missing). "
            "The download was cut: download it again"
        )
    if end < size_bytes:
        problems.append(
            f"{printable(path)}: {size_bytes - end} bytes after the last tensor: expected {end} bytes, "
            f"found {size_bytes}; safetensors refuses such a file. {_AGAIN}, or save it again"
        )
    if problems:
        raise CheckpointError(problems)
    return tuple(tensors)


def _entry_problem(path: Path, name: str, entry: Any) -> str | None:
    """What is wrong with one entry of a header, if anything."""
    where = f"{printable(path)}: {printable(name)}"
    if not isinstance(entry, dict):
        return f"{where}: its entry is {shown(entry)}, expected dtype, shape and data_offsets. {_AGAIN}"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        return f"{where}: dtype {shown(dtype)} is not one of safetensors' ({known}). Save the file with one of these"
    if not _are_sizes(shape):
        return f"{where}: shape is {shown(shape)}, expected a list of sizes. {_AGAIN}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"{where}: data_offsets is {shown(offsets)}, expected [begin, end]. {_AGAIN}"
    expected_bits, found = _elements(shape) * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    if expected_bits != 8 * found:
        return f"{where}: {dtype} {shown(shape)} takes {expected_bits / 8:g} bytes, found {found}. {_AGAIN}"
    return None


def _elements(shape: list[int]) -> int:
    """How many; where it is over 2^64, only so much: the product of a million sizes would take hours."""
    count = 0 if 0 in shape else 1
    for size in shape:
        count *= size
        if count >= 1 << 64:
            break
    return count


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _gaps(path: Path, tensors: list[TensorInfo], offset: int) -> list[str]:
    """Bytes that belong to no tensor, or to two."""
    problems, position, previous = [], offset, "the header"
    for tensor in tensors:
        if tensor.start > position:
            problems.append(
                f"{printable(path)}: {tensor.start - position} bytes between {previous} and {printable(tensor.name)} "
                f"belong to no tensor; expected none. Save the file again"
            )
        elif tensor.start < position:
            problems.append(
                f"{printable(path)}: {printable(tensor.name)} overlaps {previous} by {position - tensor.start} bytes; "
                f"expected each byte in one tensor. {_AGAIN}"
            )
        position, previous = max(position, tensor.start + tensor.n_bytes), printable(tensor.name)
    return problems


def _ask_safetensors(path: Path, real: Path) -> None:
    """Let the loader that everybody uses have the last word."""
    framework: Literal["np"] = "np"
    try:
        with safe_open(real, framework=framework):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            [f"{printable(path)}: safetensors refuses it: {printable(str(error))}. {_AGAIN}"]
        ) from error
