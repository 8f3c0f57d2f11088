"""round(W1 + alpha * (W1 - W0)) on a GPU, with what the rounding left of the update, in one pass.

    w1, w0, out (m, n) of bfloat16, float16 or float32 (w0 of any of them), rows contiguous

Bytes moved: both weights read and out written once, 6 bytes an element of 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import updates
from .launching import Arguments, Launch
from .numbers import widened
from .updates import retained, round_tile, tile_of


@triton.jit(do_not_specialize=["first", "key0", "key1"])
def kernel(
    w1_ptr,
    w0_ptr,
    out_ptr,
    sums_ptr,
    m,
    n,
    stride1,
    stride0,
    stride_out,
    alpha,
    one,
    unit,
    first,
    key0,
    key1,
    STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols = tile_of(m, n, BLOCK_M, BLOCK_N)
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    base = widened(tl.load(w1_ptr + rows[:, None] * stride1 + cols[None, :], mask=inside, other=0.0))
    w0 = widened(tl.load(w0_ptr + rows[:, None] * stride0 + cols[None, :], mask=inside, other=0.0))
    update = (base - w0) * alpha * one  # or the last product would be fused with the sum, and rounded once less
    round_tile(base, update, rows, cols, m, n, out_ptr, stride_out, sums_ptr, unit, first, key0, key1, STOCHASTIC)


def launch_of(
    w1: Tensor,
    w0: Tensor,
    alpha: float,
    out: Tensor,
    *,
    key: tuple[int, int] | None = None,
    first: int = 0,
    unit: float = 1.0,
) -> tuple[Launch, Tensor]:
    """The launch, and its sums (programs, 3) float64."""
    arguments: Arguments = {"w0_ptr": w0, "stride0": w0.stride(0), "alpha": alpha, "one": 1.0}
    return updates.launch_of(kernel, w1, w0, out, arguments, {}, unit=unit, key=key, first=first)


def fullrank_update(
    w1: Tensor,
    w0: Tensor,
    alpha: float,
    out: Tensor,
    *,
    key: tuple[int, int] | None = None,
    first: int = 0,
    unit: float = 1.0,
) -> Tensor:
    """round(W1 + alpha * (W1 - W0)) into `out`, a tensor like w1; arguments and result as in `lowrank_update`."""
    launch, sums = launch_of(w1, w0, alpha, out, key=key, first=first, unit=unit)
    launch()
    return retained(sums, unit)
