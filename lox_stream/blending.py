"""Tensors at a point of a landscape: aligned + the sum of factor * (other - aligned), rounded once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lox_stream.checkpoint import TensorInfo
from lox_stream.copying import Target, as_bytes, copy_from
from lox_stream.delta import OutOfRange
from lox_stream.errors import DataError
from lox_stream.kernels.cpu import TILE_ELEMENTS, Run, round_to_nearest, scratch
from lox_stream.matching import Step
from lox_stream.names import printable
from lox_stream.outcomes import facts_for
from lox_stream.reader import TORCH_DTYPES, mapped
from lox_stream.sinks import Use, Written


def blended(use: Use, run: Run) -> Written:
    """Write a tensor. What is another model's own, with the factor 1 alone, is copied from there."""
    started = time.perf_counter()
    step, target = use.step, use.way.place(use.step)
    (factor, other), *more = step.blend
    try:
        if factor == 1 and not more:
            dtype = "" if other.dtype == step.aligned.dtype else step.aligned.dtype
            copy_from(0, Step(step.name, other, None, "copy", step.reason, dtype=dtype), target, run)
        else:
            _blend(step, target, run)
    except OutOfRange as problem:
        raise DataError(f"{printable(step.name)}: {problem}. Choose points nearer to aligned") from problem
    elapsed_s = time.perf_counter() - started
    return Written(use, facts_for(step, (), (), target.checksum(), elapsed_s), target)


def _blend(step: Step, target: Target, run: Run) -> None:
    with contextlib.ExitStack() as maps:
        start = numbers_of(step.aligned, maps)
        others = [(factor, numbers_of(info, maps)) for factor, info in step.blend]

        def task(i: int) -> None:
            some = slice(i * TILE_ELEMENTS, (i + 1) * TILE_ELEMENTS)
            tile = blend_of(start[some], [(factor, other[some]) for factor, other in others])
            target.write(some.start * tile.element_size(), as_bytes(tile))

        run(task, -(-start.numel() // TILE_ELEMENTS))


def numbers_of(info: TensorInfo, maps: contextlib.ExitStack) -> Tensor:
    """The elements of a tensor of floats; its pages are left in the cache, for the next point reads them again."""
    return torch.frombuffer(maps.enter_context(mapped(info, again=True)), dtype=TORCH_DTYPES[info.dtype])


def blend_of(start: Tensor, others: Sequence[tuple[float, Tensor]]) -> Tensor:
    """start + sum of factor * (other - start), in float32, or float64 where one is; rounded once to start's dtype.

    Products and sums are rounded one by one, so that every processor gives the same bits. Raises NotFinite for a result
    that the dtype cannot hold. The result lies in this thread's scratch memory.

    >>> blend_of(torch.tensor([1.0, 2.0]), [(0.5, torch.tensor([3.0, 2.0])), (2.0, torch.tensor([1.0, 1.0]))])
    tensor([2., 0.])
    """
    is_wide = torch.float64 in (start.dtype, *(other.dtype for _, other in others))
    dtype, shape = torch.float64 if is_wide else torch.float32, start.shape
    wide, update = scratch(0, shape, dtype).copy_(start), scratch(1, shape, dtype).zero_()
    for factor, other in others:
        update += scratch(2, shape, dtype).copy_(other).sub_(wide).mul_(factor)
    tile = round_to_nearest(update.add_(wide), scratch(3, shape, start.dtype))
    least, most = tile.aminmax()  # of which one is NaN where any is; 30 times as fast as isfinite() on 16 bits
    if not bool(least.isfinite() & most.isfinite()):
        raise OutOfRange(f"the result is NaN, or beyond the range of {str(start.dtype).removeprefix('torch.')}")
    return tile
