"""The operations on a pair of weights.

    delta_matmul(w1, w0, x)        (W1 - W0) @ X
    delta_rmatmul(w1, w0, y)       (W1 - W0).T @ Y
    delta_normal(w1, w0, x)        Y = (W1 - W0) @ X and (W1 - W0).T @ Y, in one pass
    lowrank_update(w1, us, vh)     round(W1 + US @ Vh), with what the rounding left of the update

and `fullrank_update`, which needs no factors: those here are for weights of a CPU (`cpu`). `on_gpu` gives those for a
GPU, where products of some rows at a time add up to the same bits. This folder imports nothing of `lox_stream`.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from .cpu import (
    WIDE,
    Run,
    delta_matmul,
    delta_normal,
    delta_rmatmul,
    difference,
    fullrank_update,
    in_order,
    lowrank_update,
    sum_of_squares,
    tiling,
)
from .random_words import key_of

__all__ = [
    "WIDE",
    "GPUKernels",
    "Run",
    "delta_matmul",
    "delta_normal",
    "delta_rmatmul",
    "difference",
    "fullrank_update",
    "in_order",
    "key_of",
    "lowrank_update",
    "on_gpu",
    "sum_of_squares",
    "tiling",
]


class GPUKernels(Protocol):
    """The operations on weights of a GPU: (m, n), or rows of such matrices from a multiple of `part_rows(m, n)` on.

    Products of some rows are given `whole=m` and have the bits that these rows have in the products of the whole. A
    list `squares` receives vectors of float64, which add up to the sum of squares of the scaled difference.
    """

    def part_rows(self, m: int, n: int) -> int:
        """Rows that one term of `partial_products` sums over."""

    def delta_matmul(
        self, w1: Tensor, w0: Tensor, x: Tensor, *, whole: int, scale: float, squares: list[Tensor] | None
    ) -> Tensor:
        """(W1 - W0) * scale @ X: (rows, n) and (n, l) -> (rows, l)."""

    def partial_products(
        self, w1: Tensor, w0: Tensor, y: Tensor, *, whole: int, scale: float, squares: list[Tensor] | None
    ) -> Tensor:
        """The terms of (W1 - W0).T * scale @ Y: (rows, n) and (rows, l) -> (parts, l, n)."""

    def total(self, parts: Tensor) -> Tensor:
        """Terms added in their order: (parts, l, n) -> (l, n)."""

    def lowrank_update(
        self,
        w1: Tensor,
        us: Tensor,
        vh: Tensor,
        out: Tensor,
        *,
        whole: int,
        key: tuple[int, int] | None,
        first: int,
        unit: float,
    ) -> Tensor:
        """round(W1 + US @ Vh) into `out`, which may be w1; (3,) float64: what is left, |update|^2, not finite."""


def on_gpu(by: Literal["triton", "torch"]) -> GPUKernels:
    """The operations on weights of a GPU."""
    if by == "torch":
        from . import by_torch

        return by_torch
    from . import by_triton

    return by_triton
