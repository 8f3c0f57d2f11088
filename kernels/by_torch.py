"""The operations on weights of a GPU in torch alone, tile by tile: for where Triton does not work.

A difference is formed in the GPU's memory and read again by the product, so a pass moves the weights' bytes some four
times, which the Triton kernels move once. Tiles and the order of sums are a function of the shape alone. Products need
`torch.get_float32_matmul_precision() == "highest"`: tf32 is not enough (docs/gpu.md).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .gpu.launching import signed32
from .gpu.products import part_rows

__all__ = ["delta_matmul", "lowrank_update", "part_rows", "partial_products", "total"]

TILE_ELEMENTS = 1 << 21  # in float32 8 MiB, of which some eight are needed at a time


def _tiles(m: int, n: int, whole: int | None) -> list[list[slice]]:
    """The row tiles of each part of m rows that begin with a part of `whole` rows: a tile is whole rows of one part."""
    part, rows = part_rows(whole or m, n), max(1, TILE_ELEMENTS // n)
    ends = [min(top + part, m) for top in range(0, m, part)]
    return [[slice(top, min(top + rows, end)) for top in range(i * part, end, rows)] for i, end in enumerate(ends)]


def _difference(w1: Tensor, w0: Tensor, scale: float) -> Tensor:
    return (w1.float() * scale).sub_(w0.float() * scale)


def _sum_of_squares(tile: Tensor) -> Tensor:
    """float64 () on the device."""
    norms: Tensor = torch.linalg.vector_norm(tile, dim=1, dtype=torch.float64)
    return norms.square().sum()


def delta_matmul(
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    whole: int | None = None,
    scale: float = 1.0,
    squares: list[Tensor] | None = None,
) -> Tensor:
    """(W1 - W0) * scale @ X: weights (m, n), x (n, l) float32 -> (m, l) float32; arguments as `gpu.delta_matmul`'s."""
    m, n = w1.shape
    out = torch.empty(m, x.shape[1], dtype=torch.float32, device=w1.device)
    sums = []
    for rows in itertools.chain(*_tiles(m, n, whole)):
        tile = _difference(w1[rows], w0[rows], scale)
        torch.mm(tile, x, out=out[rows])
        if squares is not None:
            sums.append(_sum_of_squares(tile))
    if squares is not None:
        squares.append(torch.stack(sums))
    return out


def partial_products(
    w1: Tensor,
    w0: Tensor,
    y: Tensor,
    *,
    whole: int | None = None,
    scale: float = 1.0,
    squares: list[Tensor] | None = None,
) -> Tensor:
    """The terms (parts, l, n) float32 of (W1 - W0).T * scale @ Y; as `gpu.delta_rmatmul.partial_products`."""
    m, n = w1.shape
    parts = _tiles(m, n, whole)
    out = torch.zeros(len(parts), y.shape[1], n, dtype=torch.float32, device=w1.device)
    sums = []
    for term, tiles in zip(out, parts, strict=True):
        for rows in tiles:
            tile = _difference(w1[rows], w0[rows], scale)
            term.addmm_(y[rows].T, tile)
            if squares is not None:
                sums.append(_sum_of_squares(tile))
    if squares is not None:
        squares.append(torch.stack(sums))
    return out


def total(parts: Tensor) -> Tensor:
    """The sum over the first dimension, float32, parts added in their order."""
    found = parts[0].clone()
    for part in parts[1:]:
        found += part
    return found


def lowrank_update(
    w1: Tensor,
    us: Tensor,
    vh: Tensor,
    out: Tensor,
    *,
    whole: int | None = None,
    key: tuple[int, int] | None = None,
    first: int = 0,
    unit: float = 1.0,
) -> Tensor:
    """round(W1 + US @ Vh) into `out`, which may be w1: arguments and result as `gpu.lowrank_update`'s."""
    m, n = w1.shape
    sums = torch.zeros(3, dtype=torch.float64, device=w1.device)
    for rows in itertools.chain(*_tiles(m, n, whole)):
        base = w1[rows].to(torch.float32, copy=True)
        update = us[rows] @ vh
        value = base + update
        if key is not None and out.dtype != torch.float32:
            value = _by_chance(value, _words16(first + rows.start * n, value.shape, key, w1.device), out.dtype)
        out[rows] = value
        rounded = out[rows].float()
        kept, wanted = (rounded - base) * unit, update * unit
        sums[0] += (kept * wanted).sum(1, dtype=torch.float64).sum()
        sums[1] += (wanted * wanted).sum(1, dtype=torch.float64).sum()
        sums[2] += (~rounded.isfinite()).sum()
    sums[:2] /= unit**2
    return sums


def _by_chance(values: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers rounded up with the probability of what is cut off; the formulas are those of `cpu.py`."""
    if dtype == torch.bfloat16:
        rounded = ((values.view(torch.int32) + words) & -0x10000).view(torch.float32)
    else:
        wide = values.double()
        place = torch.ldexp(torch.ones_like(wide), torch.frexp(wide).exponent.sub(1).clamp_(min=-14).sub_(10))
        rounded = (torch.floor(wide / place + words * 2.0**-16) * place).float()
    return torch.where(values.isfinite(), rounded, values)


def _words16(first: int, shape: torch.Size, key: tuple[int, int], device: torch.device) -> Tensor:
    """The 16-bit random words of consecutive elements, int32: `random_words.py` has the formula."""
    index = torch.arange(first, first + shape.numel(), dtype=torch.int64, device=device)
    pair = index >> 1
    word = _mixed(pair.to(torch.int32) ^ signed32(key[0]))
    word = _mixed(word ^ signed32(key[1]) ^ (pair >> 32).to(torch.int32))
    return ((word >> ((index & 1) << 4).to(torch.int32)) & 0xFFFF).view(shape)


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 (Chris Wellons, 2018) of the 32 bits of each element."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * signed32(factor)
    return x ^ (x >> 16 & 0xFFFF)
