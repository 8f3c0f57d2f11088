"""Sums over the parts of a split loop, in their order.

    out[i] = parts[0, i] + parts[1, i] + ...        parts (splits, size) float32 -> (size,) float32

Moves (splits + 1) * size * 4 bytes: a few percent of the weights' bytes at the splits of `splits_of`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, tiles_of

BLOCK = 1024


@triton.jit
def kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(parts_ptr + at + split * tl.full((), size, tl.int64), mask=inside, other=0.0)
    tl.store(out_ptr + at, total, mask=inside)


def launch_of(parts: Tensor, out: Tensor) -> Launch:
    """parts (splits, ...) and out (...) float32, both contiguous."""
    assert all(sums.is_contiguous() for sums in (parts, out)), "partial sums have to be contiguous"
    return Launch(
        kernel,
        (tiles_of(out.numel(), BLOCK),),
        {"parts_ptr": parts, "out_ptr": out, "size": out.numel()},
        {"SPLITS": parts.shape[0], "BLOCK": BLOCK},
        num_warps=4,
        num_stages=1,
    )


def total(parts: Tensor) -> Tensor:
    """The sum over the first dimension, float32, parts added in their order."""
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    launch_of(parts, out)()
    return out
