"""The pickle in a file of `torch.save`, as descriptions of tensors. No torch, and no code of it is run.

A pickle is a program. Here it may make dictionaries, lists and plain values, and describe tensors; what else it asks
for is refused by its name. Keys are strings or numbers, so that none takes long to hash.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

MAX_BYTES = 16_000_000  # some 60,000 tensors
MAX_DIMENSIONS = 64  # torch's own limit
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
DTYPES = {  # of tensors over a storage without a type
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
KINDS = {  # how torch calls what it rebuilds -> what that is
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the device meta, which has no numbers",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_from_type_v2": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "ComplexDoubleStorage": "a tensor of complex128, which safetensors does not have",
    "complex128": "a tensor of complex128, which safetensors does not have",
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QInt32Storage"), "a quantised tensor"),
    **dict.fromkeys(("QUInt4x2Storage", "QUInt2x4Storage"), "a quantised tensor"),
}


class RefusedError(Exception):
    """What a pickle holds or asks for that is no plain tensor; its text completes "its pickle is refused: "."""


@dataclass(frozen=True)  # without slots: a class with both has a __setstate__ that a pickle may call
class StoredTensor:
    """A tensor as the part of a storage that it is; its numbers are sizes, and nothing else about them is checked."""

    dtype: str  # as safetensors names it
    key: str  # of the storage
    first: int  # element of the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    dtype: str  # "" for one without a type
    key: str


def read_pickle(file: IO[bytes]) -> dict[str, StoredTensor]:
    """The named tensors of a pickle. Raises RefusedError for everything that is none, damaged pickles too.

    Costs up to some 60 bytes of memory a byte of the pickle, where somebody wants that.
    """
    try:
        return _state_dict(_Reader(file).load())
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # the bytes are a stranger's program: whatever it does wrong, it is not loaded
        raise RefusedError(f"it is damaged or no pickle ({str(error) or type(error).__name__})") from error


def _state_dict(loaded: Any) -> dict[str, StoredTensor]:
    """The dictionary of tensors that was saved, or the only one in it: `{"model": {...}, "epoch": 3}`."""
    if _is_state_dict(loaded):
        return dict(loaded)
    if not isinstance(loaded, Mapping):
        raise RefusedError(f"it holds a {type(loaded).__name__}, expected named tensors")
    inner = [key for key, value in loaded.items() if value and _is_state_dict(value)]
    loose = [key for key, value in loaded.items() if isinstance(value, StoredTensor)]
    named = ["state_dict"] if "state_dict" in inner else inner
    if len(named) == 1 and not loose:
        return dict(loaded[named[0]])
    others = [key for key, value in loaded.items() if not isinstance(value, StoredTensor)]
    if not others:
        raise RefusedError("it holds tensors whose keys are no names, expected named tensors")
    if loose or not inner:
        raise RefusedError(f"{_shown(others)} are no tensors, expected named tensors and nothing else")
    raise RefusedError(f"it holds named tensors under {_shown(inner)}, expected them once: save the one that is meant")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(held, StoredTensor) for key, held in value.items()
    )


def _shown(keys: list[Any]) -> str:
    return ", ".join(str(key)[:60] for key in keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


WRITTEN = (  # by torch.save; others may allocate what they only claim (BYTEARRAY8), make objects, or hash anything
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.MEMOIZE, pickle.BINPUT),
    *(pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE),
    pickle.BINPERSID,
)
PLAIN: Mapping[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class _Reader(pickle._Unpickler):  # the one in Python: its memo cannot be made huge
    """Makes plain values and descriptions of tensors, and refuses the rest by its name."""

    stack: list[Any]  # since the last mark

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return _Dtype(DTYPES[name])
        if module.split(".")[0] == "torch" and name in KINDS:
            raise RefusedError(f"it holds {KINDS[name]}, expected plain ones")
        raise RefusedError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise RefusedError("it has a storage of unknown kind")
        if not isinstance(pid[1], _StorageType) or not isinstance(pid[2], str):
            raise RefusedError("it has a storage of unknown kind")
        return _Storage(pid[1].dtype, pid[2])

    def load_setitem(self) -> None:
        _hashable(self.stack[-2])
        PLAIN[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _hashable(key)
        PLAIN[pickle.SETITEMS[0]](self)

    def load_build(self) -> None:
        """Attributes that an OrderedDict of torch has (`_metadata`) change nothing; others have none."""
        self.stack.pop()

    def load_refused(self) -> None:
        raise RefusedError("it has operations that torch.save does not write")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(PLAIN, load_refused),
        **{operation[0]: PLAIN[operation[0]] for operation in WRITTEN},
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Dtype:
    name: str


def _hashable(key: Any) -> None:
    if not isinstance(key, str | int | float | bytes | None):
        raise RefusedError(f"a key in it is a {type(key).__name__}, expected a name")


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    """Empty, as torch makes them: what is in them is put there afterwards."""
    if args not in ((), ([],)):
        raise RefusedError("it makes a dictionary in a way that torch does not")
    return OrderedDict()


def _size(*args: Any) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], tuple) else ()


def _tensor_v2(storage: Any, first: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    """requires_grad, hooks and metadata follow: a view that is read with another sign is not what lies in the file."""
    metadata = rest[2] if len(rest) > 2 else None
    return _described(storage, getattr(storage, "dtype", ""), first, shape, stride, metadata)


def _tensor_v3(storage: Any, first: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    """requires_grad, hooks, dtype and metadata follow."""
    if len(rest) < 3 or not isinstance(rest[2], _Dtype):
        raise RefusedError("it has a tensor without a dtype")
    return _described(storage, rest[2].name, first, shape, stride, rest[3] if len(rest) > 3 else None)


def _described(storage: Any, dtype: str, first: Any, shape: Any, stride: Any, metadata: Any) -> StoredTensor:
    sizes = (first, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else ()
    if not isinstance(storage, _Storage) or not dtype or not sizes:
        raise RefusedError("it has a tensor without storage, shape or strides")
    if not len(shape) == len(stride) <= MAX_DIMENSIONS or not all(
        type(size) is int and 0 <= size < 1 << 62 for size in sizes
    ):
        raise RefusedError("the shape or strides of a tensor in it are no sizes")
    if metadata:
        raise RefusedError("it holds a conjugated or negated view, whose numbers are not those in the file")
    return StoredTensor(dtype, storage.key, first, shape, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    """requires_grad and hooks follow, and attributes of its own."""
    if not isinstance(data, StoredTensor):
        raise RefusedError("it has a parameter that is no tensor")
    return data


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): _StorageType(""),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
