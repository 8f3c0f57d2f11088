"""What both updates share: the rounding of a tile, what it leaves of the update, and how a matrix is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Arguments, Launch, check_weights, signed32, tiles_of
from .numbers import by_chance, narrowed, nearest, not_finite, words16

BLOCK_M, BLOCK_N = 32, 128  # not swept yet: benchmarks/gpu_day.sh


@triton.jit
def tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows (BLOCK_M,) int64 and columns (BLOCK_N,) int32, a row of tiles after the other."""
    parts = tl.cdiv(n, BLOCK_N)
    band, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    return band.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), part * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def round_tile(
    base, update, rows, cols, m, n, out_ptr, stride_out, sums_ptr, unit, first, key0, key1, STOCHASTIC: tl.constexpr
):
    """Round base + update, two float32 tiles, into `out`; the program's three sums go to `sums_ptr`."""
    inside = (rows[:, None] < m) & (cols[None, :] < n)
    if STOCHASTIC:
        words = words16(first + rows[:, None] * n + cols[None, :], key0, key1)
        rounded = by_chance(base + update, words, out_ptr.dtype.element_ty)
    else:
        rounded = nearest(base + update, out_ptr.dtype.element_ty)
    value = narrowed(rounded, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], value, mask=inside)
    kept, wanted = (rounded - base) * unit, update * unit
    at = sums_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, tl.sum(tl.sum(kept * wanted, 1).to(tl.float64), 0))
    tl.store(at + 1, tl.sum(tl.sum(wanted * wanted, 1).to(tl.float64), 0))
    tl.store(at + 2, tl.sum(tl.sum((inside & not_finite(rounded)).to(tl.int32), 1), 0).to(tl.float64))


def launch_of(
    kernel: Any,
    w1: Tensor,
    w0: Tensor,
    out: Tensor,
    arguments: Arguments,
    constants: Mapping[str, object],
    *,
    unit: float,
    key: tuple[int, int] | None,
    first: int,
) -> tuple[Launch, Tensor]:
    """The launch for w1 and out (m, n) of one dtype, and its sums (programs, 3) float64."""
    check_weights(w1, w0)
    m, n = w1.shape
    assert (out.shape, out.dtype, out.device) == (w1.shape, w1.dtype, w1.device), "out has to be like w1"
    assert out.stride(1) == 1 or n == 1, "rows of out have to be contiguous"
    stochastic = key is not None and out.dtype != torch.float32
    programs = tiles_of(m, BLOCK_M) * tiles_of(n, BLOCK_N)
    sums = torch.empty(programs, 3, dtype=torch.float64, device=w1.device)
    key0, key1 = key or (0, 0)
    own: Arguments = {
        "w1_ptr": w1,
        "out_ptr": out,
        "sums_ptr": sums,
        "m": m,
        "n": n,
        "stride1": w1.stride(0),
        "stride_out": out.stride(0),
        "unit": unit,
        "first": first,
        "key0": signed32(key0),
        "key1": signed32(key1),
    }
    blocks = {"STOCHASTIC": stochastic, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return Launch(kernel, (programs,), {**own, **arguments}, {**blocks, **constants}, num_warps=4, num_stages=2), sums


def retained(sums: Tensor, unit: float) -> Tensor:
    """(3,) float64 on the device: <rounded - W1, update>, |update|^2, and how many outputs are not finite."""
    total = sums.sum(0)
    total[:2] /= unit**2
    return total
