"""Tensors that are copied, or rounded to another dtype and no more; and where the bytes of a tensor go."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor

from lox_stream import fp8
from lox_stream.checkpoint import DTYPE_BYTES
from lox_stream.delta import NotFinite, OutOfRange
from lox_stream.errors import DataError
from lox_stream.kernels.cpu import TILE_ELEMENTS, Run, round_to_nearest
from lox_stream.matching import Step, output_bytes
from lox_stream.names import printable
from lox_stream.reader import TORCH_DTYPES, mapped
from lox_stream.update import Emit, Matrix

COPY_BYTES = 1 << 20


class Target(Protocol):
    """Where a tensor's bytes go; called from several threads, each byte once."""

    def write(self, offset: int, data: memoryview) -> None: ...

    def checksum(self) -> str: ...


class InMemory:
    """A target in memory."""

    def __init__(self, n_bytes: int) -> None:
        self.data = torch.empty(n_bytes, dtype=torch.uint8)
        self._view = self.data.numpy().data

    def write(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + data.nbytes] = data.cast("B")

    def checksum(self) -> str:
        return ""  # nobody reads it from a file again


def emit_unchanged(matrix: Matrix, emit: Emit, run: Run) -> NotFinite | None:
    """W1 as the tiles of the output; what is wrong where their dtype cannot hold it."""
    flat = matrix.w1.view(-1)
    size = COPY_BYTES // flat.element_size()

    def task(i: int) -> None:
        some = flat[i * size : (i + 1) * size]
        emit(i * size, some if matrix.dtype == some.dtype else _rounded(some, matrix.dtype))

    try:
        run(task, -(-len(flat) // size))
    except NotFinite as problem:
        return problem
    return None


def _rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, once. Raises NotFinite where that leaves the range of the dtype."""
    tile = round_to_nearest(numbers, torch.empty(numbers.shape, dtype=dtype))
    beyond = tile.isinf() & numbers.isfinite()
    if bool(beyond.any()):
        raise OutOfRange(f"{float(numbers[beyond][0]):g} is beyond the range of {str(dtype).removeprefix('torch.')}")
    return tile


def copy_from(first: int, step: Step, target: Target, run: Run) -> None:
    """The tensor from its element `first` on, in the dtype of the output."""
    with contextlib.ExitStack() as maps:
        if step.dtype and output_bytes(step):
            _convert(fp8.elements(step.aligned, step.scaled, maps, run), first, step, target, run)
        else:
            first_byte = first * DTYPE_BYTES[step.aligned.dtype] if first else 0
            copy_bytes(maps.enter_context(mapped(step.aligned))[first_byte:], target, first_byte, run)


def _convert(weight: Tensor, first: int, step: Step, target: Target, run: Run) -> None:
    """Its elements from `first` on."""

    def task(i: int) -> None:
        at = first + i * TILE_ELEMENTS
        tile = _rounded(weight[at : at + TILE_ELEMENTS], TORCH_DTYPES[step.dtype])
        target.write(at * tile.element_size(), as_bytes(tile))

    try:
        run(task, -(-(weight.numel() - first) // TILE_ELEMENTS))
    except NotFinite as problem:
        raise DataError(f"{printable(step.name)}: {problem}. Write a wider --dtype, or leave it out") from problem


def finite(numbers: Tensor) -> bool:
    """Whether all are, with a tile's worth of memory."""
    return all(bool(some.isfinite().all()) for some in numbers.split(TILE_ELEMENTS))  # type: ignore[no-untyped-call]


def copy_bytes(data: memoryview, target: Target, offset: int, run: Run) -> None:
    """All of `data`, to `offset` of the target."""

    def task(i: int) -> None:
        target.write(offset + i * COPY_BYTES, data[i * COPY_BYTES : (i + 1) * COPY_BYTES])

    run(task, -(-len(data) // COPY_BYTES))


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data
