"""The pickle `.metadata` of a DCP folder, without running any code of it.

A pickle is a program. Here it may make plain values and the classes that torch.distributed.checkpoint describes a
checkpoint with; what else it asks for is refused by its name.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import torch
from torch.distributed._shard.sharded_tensor import metadata as before_2_3
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import _get_layout

from lox_stream.names import is_plain_relative, printable
from lox_stream.pickles import PLAIN, WRITTEN, RefusedError

DESCRIPTIONS = (  # classes whose attributes a pickle may set, on what it made of them
    *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.BytesStorageMetadata, dcp.TensorStorageMetadata),
    *(dcp.ChunkStorageMetadata, dcp.TensorProperties, before_2_3.TensorProperties, _StorageInfo),
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in DESCRIPTIONS},
    **{(kind.__module__, kind.__name__): kind for kind in (dcp._MEM_FORMAT_ENCODING, before_2_3.MEM_FORMAT_ENCODING)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,  # looks a name up
    **{(home, "PosixPath"): PurePosixPath for home in ("pathlib", "pathlib._local")},  # where it was saved
    **{(home, "WindowsPath"): PureWindowsPath for home in ("pathlib", "pathlib._local")},
}


def read_metadata(path: Path) -> dcp.Metadata:
    """The tensors that a `.metadata` describes, and the files that hold them. Raises RefusedError, also for a damaged
    one, and OSError. What the pickle says of anything else is left out."""
    data = path.read_bytes()  # all at once: a string in it then takes no more memory than there are bytes of it
    try:
        return _described(_Reader(io.BytesIO(data)).load())
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # the bytes are a stranger's program: whatever it does wrong, it is not loaded
        raise RefusedError(f"it is damaged or no pickle ({str(error) or type(error).__name__})") from error


def _described(found: Any) -> dcp.Metadata:
    said, stored = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(said, dict) or not isinstance(stored, dict) or not all(isinstance(name, str) for name in said):
        raise RefusedError(f"it holds a {type(found).__name__}, expected named tensors and where they lie")
    tensors = {name: one for name, one in said.items() if isinstance(one, dcp.TensorStorageMetadata)}
    places = {at: place for at, place in stored.items() if isinstance(at, dcp.MetadataIndex) and at.fqn in tensors}
    for name, tensor in tensors.items():
        _require_tensor(name, tensor)
    for at, place in places.items():
        _require_place(at.fqn, place)
    return dcp.Metadata(dict(tensors), storage_data=places)


def _require_tensor(name: str, tensor: Any) -> None:
    said = vars(tensor)
    chunks, size = said.get("chunks"), said.get("size")
    dtype = getattr(said.get("properties"), "dtype", None)
    boxes = [vars(chunk) for chunk in chunks] if isinstance(chunks, list) and _all_chunks(chunks) else None
    sizes = [size, *(box.get(side) for box in boxes or () for side in ("offsets", "sizes"))]
    if boxes is None or not isinstance(dtype, torch.dtype) or not all(isinstance(one, torch.Size) for one in sizes):
        raise RefusedError(f"what it says of {printable(name)} is no dtype, shape and chunks")


def _all_chunks(chunks: list[Any]) -> bool:
    return all(isinstance(chunk, dcp.ChunkStorageMetadata) for chunk in chunks)


def _require_place(name: str, place: Any) -> None:
    """A file of the folder, and whole numbers: what torch opens and reads by."""
    said = vars(place) if isinstance(place, _StorageInfo) else {}
    file = said.get("relative_path")
    if not isinstance(file, str) or not all(type(said.get(key)) is int for key in ("offset", "length")):
        raise RefusedError(f"it does not say where {printable(name)} lies")
    if not is_plain_relative(file):
        raise RefusedError(f"it names the file {printable(file)!r}, which leads outside of the folder")


class _Reader(pickle._Unpickler):  # the one in Python, whose operations can be left out
    """Makes plain values and descriptions, and refuses the rest by its name."""

    stack: list[Any]  # since the last mark

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise RefusedError(f"it asks for {printable(f'{module}.{name}')}, which is no description of a tensor")

    def load_setitem(self) -> None:
        _require_key(self.stack[-2])
        PLAIN[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _require_key(key)
        PLAIN[pickle.SETITEMS[0]](self)

    def load_build(self) -> None:
        """Not of classes and functions, which are the program's own and not the pickle's."""
        if type(self.stack[-2]) not in DESCRIPTIONS:
            raise RefusedError("it changes what is no description of a tensor")
        PLAIN[pickle.BUILD[0]](self)

    def load_refused(self) -> None:
        raise RefusedError("it has operations that torch does not write")

    dispatch: ClassVar[Mapping[int, Callable[[Any], None]]] = {  # type: ignore[assignment]
        **dict.fromkeys(PLAIN, load_refused),
        **{operation[0]: PLAIN[operation[0]] for operation in (*WRITTEN, pickle.NEWOBJ)},
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


def _require_key(key: Any) -> None:
    """What takes no time to hash: tuples of tuples may take for ever."""
    if isinstance(key, dcp.MetadataIndex):
        plain = isinstance(vars(key).get("fqn"), str) and isinstance(key.offset, torch.Size | None)
    else:
        plain = isinstance(key, str | int)
    if not plain:
        raise RefusedError(f"a key in it is a {type(key).__name__}, expected a name")
