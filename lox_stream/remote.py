"""Files that lie elsewhere: read in ranges, and laid out here so that a plan sees a model before a weight is moved."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lox_stream import files
from lox_stream.adapters import CONFIG as ADAPTER
from lox_stream.adapters import WEIGHTS as ADAPTER_WEIGHTS
from lox_stream.checkpoint import TensorInfo, open_checkpoint
from lox_stream.companions import CACHE_FOLDERS
from lox_stream.errors import CheckpointError
from lox_stream.journal import sample_starts
from lox_stream.layout import is_index
from lox_stream.names import is_plain_relative, listing, printable
from lox_stream.shards import MAX_HEADER_BYTES
from lox_stream.tables import read_here
from lox_stream.ties import look_at

FIRST_BYTES = 1 << 16  # of a file of weights: most headers end within
SMALL_BYTES = 1 << 20  # files of JSON that a plan looks at
PIECE_BYTES = 8 << 20  # of one request
TRIES, FIRST_PAUSE_S = 6, 0.5  # requests for one range, and the first pause between them; each is twice the last
OTHERS = (  # formats of the same weights, and what no model needs
    *("*.gguf", "*.onnx*", "*.msgpack", "*.h5", "*.ot", "*.tflite", "*.mlmodel*", "*.pth", "*.pt", "*.ckpt", "*.npz"),
    *("original/*", "consolidated*", "*.png", "*.jpg", "*.gif", "*.mp4"),
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a model that lies elsewhere."""

    name: str  # relative to the model
    address: str  # for messages
    size: int
    fetch: Callable[[int, int], Any]  # bytes [start, end) as a buffer; see `read`
    modified_ns: int = 0
    sha256: str = ""  # hexadecimal; "": not known
    etag: str = ""  # as S3 has it, often made of MD5s; "": none

    def read(self, start: int, end: int, stop: threading.Event | None = None) -> memoryview:
        """Its bytes [start, end), asked for again where a connection breaks or the server is busy.

        `fetch` raises ConnectionError where that may help, and CheckpointError, as this does, where it does not.
        """
        if start >= end:
            return memoryview(b"")
        for attempt in range(TRIES):
            try:
                found = memoryview(self.fetch(start, end)).cast("B")
                if len(found) == end - start:
                    return found
                problem = f"{len(found)} bytes came, expected {end - start}."
            except ConnectionError as error:
                problem = first_line(error)
            if attempt + 1 < TRIES and (stop or threading.Event()).wait(FIRST_PAUSE_S * 2**attempt):
                break
        raise CheckpointError(
            [f"{printable(self.address)}: cannot be read at byte {start}: {problem} Check the connection, try again"]
        )


def is_weights(name: str) -> bool:
    """Whether a file is one of a model's shards, which are fetched when they are needed."""
    return name.endswith(".safetensors") and name.rpartition("/")[2] not in ADAPTER_WEIGHTS


def wanted(found: list[RemoteFile]) -> list[RemoteFile]:
    """The files of a model: no other formats, and of torch's only where there are no safetensors.

    Raises CheckpointError for a name that leads elsewhere.
    """
    outside = [file for file in found if not is_plain_relative(file.name)]
    if outside:
        raise CheckpointError(
            [f"{printable(outside[0].address)}: is no plain name within the model. Do not trust it before you know why"]
        )
    plain = any(file.name.endswith(".safetensors") for file in found)
    return [
        file
        for file in found
        if not any(fnmatchcase(file.name, glob) for glob in OTHERS)
        and not any(CACHE_FOLDERS.fullmatch(part) for part in file.name.split("/")[:-1])
        and not file.name.startswith(".")
        and not (plain and _of_torch(file.name))
    ]


def _of_torch(name: str) -> bool:
    return (name.endswith(".bin") and name not in ADAPTER_WEIGHTS) or (is_index(name) and ".bin." in name)


def require_safetensors(found: list[RemoteFile], address: str) -> None:
    """Raise CheckpointError for a model whose weights cannot be fetched shard by shard."""
    names = {file.name for file in found}
    others = sorted(name for name in names if _of_torch(name))
    if others and not any(map(is_weights, names)):
        raise CheckpointError(
            [
                f"{printable(address)}: its weights are in {listing(others)}, expected *.safetensors for what passes "
                "through a scratch. Download it, or convert it first"
            ]
        )


def tells_by_headers(found: list[RemoteFile]) -> bool:
    """Whether a plan can be made of headers: weights in safetensors, and no adapter."""
    names = {file.name for file in found}
    return any(map(is_weights, names)) and ADAPTER not in names


def lay_out(file: RemoteFile, folder: Path, *, dry: bool) -> None:
    """Make the file in a folder: of weights the header, and the samples that tell models apart; the rest is a hole.

    `dry`: only what a plan looks at; other files stay empty. Raises CheckpointError, OSError.
    """
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        if is_weights(file.name):
            header = _header(file)
            files.write_at(fd, header, 0)
            starts = [] if dry else sample_starts(8 + int.from_bytes(header[:8], "little"), file.size)
            for start, n_bytes in starts:
                if start + n_bytes > len(header):
                    files.write_at(fd, file.read(start, start + n_bytes), start)
            os.ftruncate(fd, file.size)
        elif (
            not dry
            or path.name in ADAPTER_WEIGHTS
            or is_index(path.name)
            or (path.suffix == ".json" and file.size <= SMALL_BYTES)
        ):
            for start in range(0, file.size, PIECE_BYTES):
                files.write_at(fd, file.read(start, min(start + PIECE_BYTES, file.size)), start)
    os.utime(path, ns=(file.modified_ns, file.modified_ns))


def lay_out_tables(found: Sequence[RemoteFile], folder: Path) -> None:
    """Put in place what else of its weights a plan looks at, once all headers of a model are laid out in a folder.

    A model that cannot be opened is left as it is: the plan says what is wrong. Raises CheckpointError, OSError.
    """
    weights = {(folder / file.name).resolve(): file for file in found if is_weights(file.name)}
    try:
        opened = open_checkpoint(next(iter(weights)) if len(found) == len(weights) == 1 else folder)
    except CheckpointError:
        return

    def read(tensor: TensorInfo, start: int, end: int) -> bytes:
        file = weights.get(tensor.path)
        if file is None:  # it has been laid out whole
            return read_here(tensor, start, end)
        data = file.read(tensor.start + start, tensor.start + end)
        with files.opened(tensor.path, os.O_WRONLY) as fd:
            files.write_at(fd, data, tensor.start + start)
        os.utime(tensor.path, ns=(file.modified_ns, file.modified_ns))
        return bytes(data)

    look_at(opened, read)


def _header(file: RemoteFile) -> memoryview:
    """The header of a safetensors file, its length in front, as far as that can be one; who opens it judges it."""
    first = file.read(0, min(FIRST_BYTES, file.size))
    length = 8 + int.from_bytes(first[:8], "little")
    if length <= len(first) or length > min(file.size, 8 + MAX_HEADER_BYTES):
        return first
    return memoryview(bytes(first) + bytes(file.read(len(first), length)))


def first_line(error: BaseException) -> str:
    """What another library says, in one sentence."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return printable(text if text.endswith(".") else f"{text}.")
