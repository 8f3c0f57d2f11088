"""(W1 - W0).T * scale @ Y on a GPU, the difference formed tile by tile and never stored.

    w1, w0 (m, n) of bfloat16, float16 or float32, rows contiguous; y (m, l) float32  ->  (n, l) float32

A program takes BLOCK_N columns and a part of the rows, and multiplies y.T by each tile, so that a tile is used as it
was read, not turned. Bytes moved: the weights once, y from the L2 cache once for each band of columns, and
splits * n * l * 8 of partial sums, which are added in a fixed order. A y wider than 64 columns goes in groups of 64.
Products and sums as in delta_matmul.py.

There is no kernel for both products in one pass, as on a CPU. There a tile of whole rows stays in a core's cache until
it is multiplied a second time. Here 132 processors with 16 rows each would need 8 KiB * n of the L2 cache for the
weights and as much for the sums over the columns: its 50 MB hold that up to n = 3000, where the whole pair is hardly
larger and a second pass finds it in the cache anyway.
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
TILES = {16: (32, 128, 4), 32: (32, 128, 4), 64: (32, 64, 4)}


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
    cols, lane = band * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    first = tl.program_id(1) * part
    for top in range(first, tl.minimum(first + part, m), BLOCK_M):
        rows = top + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (rows[:, None] < m) & (cols[None, :] < n)
        w1 = widened(tl.load(w1_ptr + rows[:, None] * stride1 + cols[None, :], mask=inside, other=0.0))
        w0 = widened(tl.load(w0_ptr + rows[:, None] * stride0 + cols[None, :], mask=inside, other=0.0))
        delta = w1 * scale - w0 * scale
        there = (lane[:, None] < lanes) & (rows[None, :] < m)
        at = rows[None, :] * stride_x + lane[:, None].to(tl.int64) * stride_l
        acc += tl.dot(tl.load(x_ptr + at, mask=there, other=0.0), delta, input_precision=PRECISION) * one
        if SQUARES:
            squares += tl.sum(delta * delta, 0).to(tl.float64)
    at = (split * lanes + lane[:, None]) * n + cols[None, :]
    tl.store(out_ptr + at, acc, mask=(lane[:, None] < lanes) & (cols[None, :] < n))
    if SQUARES:
        tl.store(squares_ptr + split * tl.num_programs(0) + band, tl.sum(squares, 0))


def launch_of(w1: Tensor, w0: Tensor, y: Tensor, **how: Any) -> tuple[Launch, Tensor, Tensor]:
    """`products.launch_of` for y of up to 64 columns."""
    return products.launch_of(kernel, TILES, w1, w0, y, turned=True, **how)


def delta_rmatmul(w1: Tensor, w0: Tensor, y: Tensor, **how: Any) -> Tensor:
    """(W1 - W0).T * scale @ Y: weights (m, n), y (m, l) float32 -> (n, l) float32; arguments as of `partial_products`.

    The result is a transposed view: its rows are not contiguous.
    """
    return total(partial_products(w1, w0, y, **how)).T


def partial_products(
    w1: Tensor,
    w0: Tensor,
    y: Tensor,
    *,
    whole: int | None = None,
    scale: float = 1.0,
    squares: list[Tensor] | None = None,
    precision: str = PRECISION,
) -> Tensor:
    """The terms (parts, l, n) float32 of (W1 - W0).T * scale @ Y, transposed: each of `part_rows` rows; added in order.

    `squares` as in `delta_matmul`. The weights, and y, may be some rows of matrices with `whole` of them, from a
    multiple of `part_rows(whole, n)` on: they give the terms of these rows, with the bits that these have in the whole.
    """
    groups = products.parts_of(launch_of, w1, w0, y, whole=whole, scale=scale, squares=squares, precision=precision)
    return products.joined(groups, 1)
