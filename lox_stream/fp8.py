"""Matrices of FP8 taken apart into float32, and put together again with fresh scales."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lox_stream.checkpoint import TensorInfo
from lox_stream.kernels import Run, in_order
from lox_stream.kernels.random_words import words16
from lox_stream.reader import TORCH_DTYPES, mapped
from lox_stream.scales import Blocks, Scaled

BAND = 128  # rows that are worked on at a time, in a core's cache
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # bits
LOWEST = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}  # exponent below which the steps no longer shrink


def opened(info: TensorInfo, scaled: Scaled, run: Run = in_order) -> Tensor:
    """A weight of FP8 as float32 (m, n), in memory of its own. Reads it once."""
    with mapped(info) as q, mapped(scaled.scale) as scale:
        return dequantised(_tensor(q, info).view(info.shape), _tensor(scale, scaled.scale), scaled.blocks, run)


def elements(info: TensorInfo, scaled: Scaled | None, maps: contextlib.ExitStack, run: Run = in_order) -> Tensor:
    """A tensor's elements where they lie, for as long as `maps` are open, or of FP8 in float32."""
    return _tensor(maps.enter_context(mapped(info)), info) if scaled is None else opened(info, scaled, run).view(-1)


def scales_of(scaled: Scaled) -> Tensor:
    """The scales as they are stored."""
    with mapped(scaled.scale) as data:
        return _tensor(data, scaled.scale).view(scaled.scale.shape).clone()


def _tensor(data: memoryview, info: TensorInfo) -> Tensor:
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype])


def dequantised(q: Tensor, scale: Tensor, blocks: Blocks, run: Run = in_order) -> Tensor:
    """q * scale: FP8 (m, n) and one scale for each block -> float32 (m, n)."""
    out = torch.empty(q.shape, dtype=torch.float32)

    def task(i: int) -> None:
        band = slice(i * BAND, (i + 1) * BAND)
        _band_of(q, scale, blocks, band, out[band])

    run(task, -(-q.shape[0] // BAND))
    return out


def retention(
    info: TensorInfo, scaled: Scaled, total: Tensor, q: Tensor, scale: Tensor, run: Run = in_order
) -> float | None:
    """The share of the update, total - W1, that is left in q * scale - W1, W1 as it is stored; None without an update.

    Reads W1 once; a band at a time, with sums in their order.
    """
    count = -(-total.shape[0] // BAND)
    sums = [(0.0, 0.0)] * count
    before = scales_of(scaled)
    with mapped(info) as data:
        old = _tensor(data, info).view(info.shape)

        def task(i: int) -> None:
            band = slice(i * BAND, (i + 1) * BAND)
            w1 = _band_of(old, before, scaled.blocks, band, torch.empty_like(total[band]))
            left = _band_of(q, scale, scaled.blocks, band, torch.empty_like(w1)).sub_(w1).view(-1)
            update = (total[band] - w1).view(-1)
            sums[i] = float(torch.dot(left, update)), float(torch.dot(update, update))

        run(task, count)
    square = math.fsum(of for _, of in sums)
    return math.fsum(of for of, _ in sums) / square if square > 0 else None


def _band_of(q: Tensor, scale: Tensor, blocks: Blocks, band: slice, out: Tensor) -> Tensor:
    return out.copy_(q[band]).mul_(_spread(scale, blocks, band, q.shape))


def fresh_scales(total: Tensor, dtype: torch.dtype, blocks: Blocks, like: Tensor, run: Run = in_order) -> Tensor:
    """Scales by which the largest number of each block becomes the largest of `dtype`: (m, n) -> as `like`.

    Where the scales of `like` are all powers of two, the next power of two. A block of zeros has scale 1, and none is
    so small that its dtype makes it zero, or much less than it is.
    """
    (m, n), (down, across) = total.shape, blocks.grid(*total.shape)
    of_rows = torch.empty(m, across)

    def task(i: int) -> None:
        band = slice(i * BAND, (i + 1) * BAND)
        padded = pad(total[band].abs(), (0, across * blocks.columns - n))
        torch.amax(padded.view(-1, across, blocks.columns), dim=2, out=of_rows[band])

    run(task, -(-m // BAND))
    largest = pad(of_rows, (0, 0, 0, down * blocks.rows - m)).view(down, blocks.rows, across).amax(dim=1)
    scale = torch.where(largest > 0, largest / LARGEST[dtype], torch.ones(()))
    if bool((torch.frexp(like.float())[0] == 0.5).all()):
        scale = torch.exp2(torch.log2(scale).ceil())
    finfo = torch.finfo(like.dtype)
    step = finfo.tiny * finfo.eps  # of the subnormal numbers
    rounded_up = (scale / step).ceil().clamp(min=1) * step
    return torch.where(scale < finfo.tiny, rounded_up, scale).to(like.dtype).view(like.shape)


def quantise(
    total: Tensor, scale: Tensor, blocks: Blocks, out: Tensor, key: tuple[int, int] | None = None, run: Run = in_order
) -> None:
    """Round total / scale into `out`: float32 (m, n) -> FP8 (m, n), to nearest even, or with `key` stochastically."""

    def task(i: int) -> None:
        band = slice(i * BAND, (i + 1) * BAND)
        some = total[band] / _spread(scale, blocks, band, total.shape)
        some.clamp_(-LARGEST[out.dtype], LARGEST[out.dtype])  # a scale of bfloat16 may be a little too small
        if key is not None:
            _round_up_or_down(some, out.dtype, words16(band.start * total.shape[1], some.numel(), key))
        out[band].copy_(some)

    run(task, -(-total.shape[0] // BAND))


def _spread(scale: Tensor, blocks: Blocks, band: slice, shape: Sequence[int]) -> Tensor:
    """The scale of each element of some rows: (rows, n) float32, or (rows, 1) where a row has one."""
    m, n = shape
    down, across = blocks.grid(m, n)
    rows = torch.arange(band.start, min(band.stop, m)) // blocks.rows
    found = scale.float().view(down, across)[rows]
    return found if across == 1 else found.repeat_interleave(blocks.columns, dim=1)[:, :n]


def _round_up_or_down(numbers: Tensor, dtype: torch.dtype, words: np.ndarray) -> None:
    """In place, onto the grid of `dtype`, up with the probability of what is cut off below (16 random bits each)."""
    exponent = torch.frexp(numbers)[1].sub_(1).clamp_(min=LOWEST[dtype])
    place = torch.ldexp(torch.ones_like(numbers), exponent - MANTISSA[dtype])
    part = torch.from_numpy(words.astype(np.float32)).view(numbers.shape).mul_(2.0**-16)
    numbers.div_(place).add_(part).floor_().mul_(place)
