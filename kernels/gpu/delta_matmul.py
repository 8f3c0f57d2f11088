"""(W1 - W0) * scale @ X on a GPU, the difference formed tile by tile and never stored.

    w1, w0 (m, n) of bfloat16, float16 or float32, rows contiguous; x (n, l) float32  ->  (m, l) float32

A program takes BLOCK_M rows and a part of the columns. Bytes moved: the weights once, x from the L2 cache once for each
band of rows, and splits * m * l * 8 of partial sums, which are added in a fixed order. An x wider than 64 columns goes
in groups of 64, and the weights are read for each.

The products run on the tensor cores with both factors split into two numbers of tf32 (three products of four), and each
tile's product is added to the sum as an IEEE float32: the tensor cores' own sums are not rounded to nearest, and their
error would grow with n. The factor `one` keeps the compiler from folding that addition into them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import products
from .launching import Launch
from .numbers import widened
from .partial_sums import total
from .products import PRECISION

# rows, columns, warps; not swept on a GPU yet, which `benchmarks/gpu_day.sh` does
TILES = {16: (64, 64, 4), 32: (64, 32, 4), 64: (64, 32, 4)}


@triton.jit
def kernel(
    w1_ptr,
    w0_ptr,
    x_ptr,
    out_ptr,
    squares_ptr,
    m,
    n,
    lanes,
    stride1,
    stride0,
    stride_x,
    stride_l,
    part,
    scale,
    one,
    SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    band, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, lane = band * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float64)
    first = tl.program_id(1) * part
    for left in range(first, tl.minimum(first + part, n), BLOCK_N):
        cols = left + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        w1 = widened(tl.load(w1_ptr + rows[:, None] * stride1 + cols[None, :], mask=inside, other=0.0))
        w0 = widened(tl.load(w0_ptr + rows[:, None] * stride0 + cols[None, :], mask=inside, other=0.0))
        delta = w1 * scale - w0 * scale
        there = (cols[:, None] < n) & (lane[None, :] < lanes)
        at = cols[:, None].to(tl.int64) * stride_x + lane[None, :].to(tl.int64) * stride_l
        acc += tl.dot(delta, tl.load(x_ptr + at, mask=there, other=0.0), input_precision=PRECISION) * one
        if SQUARES:
            squares += tl.sum(delta * delta, 1).to(tl.float64)
    at = (split * m + rows[:, None]) * lanes + lane[None, :]
    tl.store(out_ptr + at, acc, mask=(rows[:, None] < m) & (lane[None, :] < lanes))
    if SQUARES:
        tl.store(squares_ptr + split * tl.num_programs(0) + band, tl.sum(squares, 0))


def launch_of(w1: Tensor, w0: Tensor, x: Tensor, **how: Any) -> tuple[Launch, Tensor, Tensor]:
    """`products.launch_of` for x of up to 64 columns."""
    return products.launch_of(kernel, TILES, w1, w0, x, turned=False, **how)


def delta_matmul(
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    whole: int | None = None,
    scale: float = 1.0,
    squares: list[Tensor] | None = None,
    precision: str = PRECISION,
) -> Tensor:
    """(W1 - W0) * scale @ X: weights (m, n), x (n, l) float32 -> (m, l) float32; scale a power of two.

    `squares`, if given, receives a vector of float64 on the device, the sums of squares of parts of the scaled
    difference: one is not finite where a weight is not. The weights may be some rows of matrices with `whole` of them,
    from a multiple of 64 on; these rows of the product have the bits that they have in the whole one.
    """
    groups = products.parts_of(launch_of, w1, w0, x, whole=whole, scale=scale, squares=squares, precision=precision)
    return products.joined([total(parts) for parts in groups], 1)
