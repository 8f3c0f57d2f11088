"""round(W1 + US @ Vh) on a GPU, with what the rounding left of the update, in one pass over W1.

    w1, out (m, n) of bfloat16, float16 or float32, rows contiguous; us (m, k), vh (k, n) float32, contiguous

Bytes moved: w1 read and out written once (4 bytes an element of 16 bits), and the factors from the L2 cache once for
each tile of 32 x 128: k * 0.04 bytes an element. Products and sums as in delta_matmul.py, in steps of BLOCK_K of the
rank. Summed without the tensor cores, rank 6 took 198 loads of 4 bytes a thread where this takes 10, most of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import updates
from .launching import Arguments, Launch, power_of_two_over
from .numbers import widened
from .products import PRECISION
from .updates import retained, round_tile, tile_of

FEWEST, MOST = 16, 32  # of the rank, in one product; Triton 3.6 takes no fewer


@triton.jit(do_not_specialize=["first", "key0", "key1"])
def kernel(
    w1_ptr,
    us_ptr,
    vh_ptr,
    out_ptr,
    sums_ptr,
    m,
    n,
    stride1,
    stride_out,
    unit,
    one,
    first,
    key0,
    key1,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols = tile_of(m, n, BLOCK_M, BLOCK_N)
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    base = widened(tl.load(w1_ptr + rows[:, None] * stride1 + cols[None, :], mask=inside, other=0.0))
    update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, RANK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (rows[:, None] < m) & (k[None, :] < RANK)
        us = tl.load(us_ptr + rows[:, None] * RANK + k[None, :], mask=there, other=0.0)
        there = (k[:, None] < RANK) & (cols[None, :] < n)
        vh = tl.load(vh_ptr + k[:, None].to(tl.int64) * n + cols[None, :], mask=there, other=0.0)
        update += tl.dot(us, vh, input_precision=PRECISION) * one
    round_tile(base, update, rows, cols, m, n, out_ptr, stride_out, sums_ptr, unit, first, key0, key1, STOCHASTIC)


def launch_of(
    w1: Tensor,
    us: Tensor,
    vh: Tensor,
    out: Tensor,
    *,
    key: tuple[int, int] | None = None,
    first: int = 0,
    unit: float = 1.0,
    precision: str = PRECISION,
) -> tuple[Launch, Tensor]:
    """The launch, and its sums (programs, 3) float64."""
    k = us.shape[1]
    assert (us.shape, vh.shape) == ((w1.shape[0], k), (k, w1.shape[1])), "the factors do not fit the weight"
    assert us.dtype == vh.dtype == torch.float32, "the factors have to be float32"
    assert all(factor.is_contiguous() for factor in (us, vh)), "the factors have to be contiguous"
    assert us.device == vh.device == w1.device, "the factors are on another device"
    arguments: Arguments = {"us_ptr": us, "vh_ptr": vh, "one": 1.0}
    constants = {"RANK": k, "PRECISION": precision, "BLOCK_K": min(power_of_two_over(k, FEWEST), MOST)}
    return updates.launch_of(kernel, w1, w1, out, arguments, constants, unit=unit, key=key, first=first)


def lowrank_update(
    w1: Tensor,
    us: Tensor,
    vh: Tensor,
    out: Tensor,
    *,
    key: tuple[int, int] | None = None,
    first: int = 0,
    unit: float = 1.0,
) -> Tensor:
    """round(W1 + US @ Vh) into `out`, which may be w1: (m, n) of one dtype, us (m, k), vh (k, n) float32, k 1 to 256.

    Rounds once: to nearest, or stochastically where `key` is given and the dtype is of 16 bits; `first` is the index in
    the tensor of the first element. `unit` is a power of two that brings the update to a size whose squares float32
    holds. Returns (3,) float64 on the device: <rounded - W1, update>, |update|^2, and how many outputs are not finite.
    """
    launch, sums = launch_of(w1, us, vh, out, key=key, first=first, unit=unit)
    launch()
    return retained(sums, unit)
