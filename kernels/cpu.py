"""The kernels on a CPU: tiles of half a million elements that stay in a core's cache, so a weight is read once a pass.

Delta is never stored: a tile is widened to float32, subtracted, multiplied and forgotten. The tiles are a function of
the shape alone, each sum is taken in tile order, and no tile is split between threads, so the bits do not depend on
how `run` spreads the tasks. Every task must find torch at one thread (`torch.set_num_threads(1)`).

One thread of an AMD EPYC (Zen 4), 4096 x 4096 bf16, 16 columns: 5.6 ms to form the tiles, 13 ms with the product;
contiguous rows matter most (tiles of 256 x 2048 take 19 ms). `benchmarks/bench_kernels.py` measures it again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .random_words import words16

Run = Callable[[Callable[[int], None], int], None]  # run(task, count): task(0) ... task(count - 1), anywhere, any order

TILE_ELEMENTS = 1 << 19
WIDE = 1 << 15  # rows longer than this are cut
CHUNK_TILES = 8  # row tiles that one task of delta_rmatmul sums in place
MAX_CHUNKS = 32  # partial sums of one delta_rmatmul


def in_order(task: Callable[[int], None], count: int) -> None:
    """The simplest `Run`: one after the other, here."""
    for i in range(count):
        task(i)


def tiling(m: int, n: int) -> tuple[int, int]:
    """(rows, columns) of a tile of an (m, n) matrix: whole rows, unless they are longer than 32768."""
    columns = n if n <= WIDE else max(WIDE // 2, min(n, TILE_ELEMENTS // max(m, 1)))
    return max(1, min(m, TILE_ELEMENTS // max(columns, 1))), columns


_local = threading.local()


def scratch(slot: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """This thread's reusable buffer `slot`; fresh memory costs more in page faults than the arithmetic."""
    buffers: dict[tuple[int, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((slot, dtype))
    if buffer is None or buffer.numel() < shape.numel():
        buffer = buffers[slot, dtype] = torch.empty(max(shape.numel(), TILE_ELEMENTS), dtype=dtype)
    return buffer[: shape.numel()].view(shape)


def difference(w1: Tensor, w0: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """(w1 - w0) * scale of one tile in float32, scale a power of two; exact but for the one rounding.

    The result is `out`, or lies in this thread's scratch memory.
    """
    wide = torch.float64 if torch.float64 in (w1.dtype, w0.dtype) else torch.float32
    a = out if out is not None and wide == torch.float32 else scratch(0, w1.shape, wide)
    b = scratch(1, w1.shape, wide)
    a.copy_(w1)
    b.copy_(w0)
    if scale != 1.0:
        a.mul_(scale)
        b.mul_(scale)
    a.sub_(b)
    if wide == torch.float32:
        return a
    return (scratch(2, w1.shape, torch.float32) if out is None else out).copy_(a)


def delta_matmul(
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    scale: float = 1.0,
    squares: list[float] | None = None,
    run: Run = in_order,
) -> Tensor:
    """(W1 - W0) * scale @ X: weights (m, n) of any float dtypes, x (n, l) float32 -> (m, l) float32.

    `squares`, if given, receives sums of squares of the difference that add up to the whole, in the order of the tasks.
    Moves the weights once.
    """
    _check(w1, w0)
    m, n = w1.shape
    rows, columns = tiling(m, n)
    out = torch.empty(m, x.shape[1], dtype=torch.float32)
    count = -(-m // rows)
    sums = [0.0] * count

    def task(i: int) -> None:
        band = slice(i * rows, min((i + 1) * rows, m))
        for j in range(0, n, columns):
            part = slice(j, j + columns)
            tile = difference(w1[band, part], w0[band, part], scale)
            torch.addmm(out[band], tile, x[part], beta=0 if j == 0 else 1, out=out[band])
            if squares is not None:
                sums[i] += sum_of_squares(tile)

    run(task, count)
    if squares is not None:
        squares.extend(sums)
    return out


def sum_of_squares(tile: Tensor) -> float:
    """In float64 over float32 sums of 1024 elements each: float32 alone loses five digits over a long row."""
    flat = tile.reshape(-1)
    whole = flat.numel() // 1024 * 1024
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1).double()
    return float(norms.square().sum() + flat[whole:].double().square().sum())


def delta_rmatmul(
    w1: Tensor,
    w0: Tensor,
    y: Tensor,
    *,
    scale: float = 1.0,
    squares: list[float] | None = None,
    run: Run = in_order,
) -> Tensor:
    """(W1 - W0).T * scale @ Y: weights (m, n) of any float dtypes, y (m, l) float32 -> (n, l) float32.

    `squares` as in `delta_matmul`. A task sums `Y.T @ tile` in place over eight or more row tiles; at most 32 such sums
    are kept and added in order. Moves the weights once. The result is a transposed view: its rows are not contiguous.
    """
    _check(w1, w0)
    m, n = w1.shape
    rows, columns = tiling(m, n)
    chunks, parts = _chunks(m, rows), -(-n // columns)
    sums = torch.empty(len(chunks), y.shape[1], n, dtype=torch.float32)
    norms = [0.0] * (len(chunks) * parts)

    def task(i: int) -> None:
        chunk, part = divmod(i, parts)
        across = slice(part * columns, min((part + 1) * columns, n))
        out = sums[chunk, :, across]
        for first, band in enumerate(chunks[chunk]):
            tile = difference(w1[band, across], w0[band, across], scale)
            torch.addmm(out, y[band].T, tile, beta=0 if first == 0 else 1, out=out)
            if squares is not None:
                norms[i] += sum_of_squares(tile)

    run(task, len(norms))
    if squares is not None:
        squares.extend(norms)
    return _total(sums).T


def delta_normal(
    w1: Tensor, w0: Tensor, x: Tensor, *, scale: float = 1.0, run: Run = in_order
) -> tuple[Tensor, Tensor]:
    """Y = (W1 - W0) * scale @ X and (W1 - W0).T * scale @ Y: x (n, l) float32 -> (m, l) and (n, l) float32.

    Both products of a tile while it lies in the cache: it is formed once, and the weights move once for two products.
    One thread of an EPYC (Zen 4), 4096 x 4096 bf16, 16 columns: 22.5 ms against 29.6 ms for the two one by one. A tile
    is whole rows here, so it is for rows of up to WIDE elements. Sums and order as in `delta_rmatmul`.
    """
    _check(w1, w0)
    m, n = w1.shape
    assert n <= WIDE, "rows are cut: the two products are not to be had from one tile"
    chunks = _chunks(m, tiling(m, n)[0])
    out = torch.empty(m, x.shape[1], dtype=torch.float32)
    sums = torch.empty(len(chunks), x.shape[1], n, dtype=torch.float32)

    def task(i: int) -> None:
        for first, band in enumerate(chunks[i]):
            tile = difference(w1[band], w0[band], scale)
            torch.mm(tile, x, out=out[band])
            torch.addmm(sums[i], out[band].T, tile, beta=0 if first == 0 else 1, out=sums[i])

    run(task, len(chunks))
    return out, _total(sums).T


def _chunks(m: int, rows: int) -> list[list[slice]]:
    """The row tiles of a matrix, by the task that sums over them: a function of the shape alone."""
    bands = [slice(top, min(top + rows, m)) for top in range(0, m, rows)]
    length = max(CHUNK_TILES, -(-len(bands) // MAX_CHUNKS))
    return [bands[first : first + length] for first in range(0, len(bands), length)]


def _total(sums: Tensor) -> Tensor:
    """The partial sums added up in their order, into the first."""
    total = sums[0]
    for partial in sums[1:]:
        total += partial
    return total


@dataclass(frozen=True, slots=True)
class Retained:
    """What rounding left: `<rounded - W1, update>` and `|update|^2`, and whether all outputs are finite."""

    dot: float
    square: float
    finite: bool = True

    @property
    def retention(self) -> float | None:
        """dot / square; None without an update, and where the squares leave float64."""
        return self.dot / self.square if 0 < self.square < math.inf and math.isfinite(self.dot) else None


def lowrank_update(
    w1: Tensor, us: Tensor, vh: Tensor, out: Tensor, *, key: tuple[int, int] | None = None, first: int = 0
) -> Retained:
    """round(W1 + US @ Vh) into `out`, for one block: w1 and out (r, c) of one dtype, us (r, k), vh (k, c).

    The factors are float32, or float64 for float64 weights. Rounds once: to nearest, or stochastically where `key`
    is given and the dtype is bfloat16 or float16; `first` is the index in the tensor of the block's first element
    (its elements are consecutive).
    """
    wide = us.dtype
    update = torch.mm(us, vh, out=scratch(1, w1.shape, wide))
    base = scratch(0, w1.shape, wide).copy_(w1)
    total = torch.add(base, update, out=scratch(2, w1.shape, wide))
    return _round(base, update, total, out, key, first)


def fullrank_update(
    w1: Tensor, w0: Tensor, alpha: float, out: Tensor, *, key: tuple[int, int] | None = None, first: int = 0
) -> Retained:
    """round(W1 + alpha * (W1 - W0)) into `out`, for one block; arguments as in `lowrank_update`."""
    wide = torch.float64 if torch.float64 in (w1.dtype, w0.dtype) else torch.float32
    base = scratch(0, w1.shape, wide).copy_(w1)
    update = scratch(1, w1.shape, wide).copy_(w0)
    torch.sub(base, update, out=update).mul_(alpha)
    total = torch.add(base, update, out=scratch(2, w1.shape, wide))
    return _round(base, update, total, out, key, first)


def _round(
    base: Tensor, update: Tensor, total: Tensor, out: Tensor, key: tuple[int, int] | None, first: int
) -> Retained:
    """Round `total` into `out` and measure what is left of `update`. Overwrites `total`."""
    if key is None or out.dtype not in (torch.bfloat16, torch.float16):
        round_to_nearest(total, out)
    else:
        words = words16(first, total.numel(), key).reshape(total.shape)
        (_stochastic_bf16 if out.dtype == torch.bfloat16 else _stochastic_fp16)(total, words, out)
    kept, flat = total.copy_(out).sub_(base).view(-1), update.view(-1)
    dot, square = float(torch.dot(kept, flat)), float(torch.dot(flat, flat))
    if not 1e-30 < square < 1e30 or not math.isfinite(dot):  # of a size whose squares float32 cannot hold
        kept, flat = kept.double(), flat.double()
        dot, square = float(torch.dot(kept, flat)), float(torch.dot(flat, flat))
    return Retained(dot, square, math.isfinite(dot) or bool(out.isfinite().all()))


def round_to_nearest(total: Tensor, out: Tensor) -> Tensor:
    """Round `total` into `out`, of one shape and any float dtypes, ties to even, once; returns `out`.

    torch takes float64 to 16 bits through float32. Rounding to odd on the way there keeps the second rounding right:
    where the float32 is not exact and even, it steps to its odd neighbour on the side of the true value.
    """
    if total.dtype == torch.float64 and out.dtype in (torch.bfloat16, torch.float16):
        near = total.float()
        toward = torch.where(total > near.double(), torch.inf, -torch.inf).float()
        inexact = near.double() != total
        even = (near.view(torch.int32) & 1) == 0
        return out.copy_(torch.where(inexact & even & near.isfinite(), torch.nextafter(near, toward), near))
    return out.copy_(total)


def _stochastic_bf16(total: Tensor, words: np.ndarray, out: Tensor) -> None:
    """Add 16 random bits below bfloat16's last place and cut: up with the probability of the fraction cut off."""
    total = total.float()
    bits = total.numpy().view(np.uint32)  # infinities have no low bits, and stay
    np.add(bits, words, out=bits)
    np.bitwise_and(bits, np.uint32(0xFFFF0000), out=bits)
    out.copy_(total)


def _stochastic_fp16(total: Tensor, words: np.ndarray, out: Tensor) -> None:
    """The same for float16, whose last place is 2^(e - 10) and 2^-24 below 2^-14."""
    value = total.double().numpy()
    _, exponent = np.frexp(value)
    place = np.ldexp(1.0, np.maximum(exponent - 1, -14) - 10)
    with np.errstate(invalid="ignore"):
        rounded = np.floor(value / place + words * 2.0**-16) * place
    out.copy_(torch.from_numpy(rounded))


def _check(w1: Tensor, w0: Tensor) -> None:
    assert w1.ndim == 2, "a weight is a matrix here"
    assert w1.shape == w0.shape, "base and aligned differ in shape"
    assert w1.stride(1) == 1 or w1.shape[1] == 1, "rows have to be contiguous"
