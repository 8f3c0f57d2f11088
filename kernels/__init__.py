"""The operations on a pair of weights, chosen by the device that holds them.

    delta_matmul(w1, w0, x)        (W1 - W0) @ X
    delta_rmatmul(w1, w0, y)       (W1 - W0).T @ Y
    delta_normal(w1, w0, x)        Y = (W1 - W0) @ X and (W1 - W0).T @ Y: in one pass on a CPU, in two on a GPU
    lowrank_update(w1, us, vh)     round(W1 + US @ Vh), with what the rounding left of the update

and `fullrank_update`, which needs no factors. The products take weights of the CPU or of a GPU; the updates are given
tile by tile on a CPU (`cpu`) and whole on a GPU (`gpu.lowrank_update`). This folder imports nothing of `lox_stream`.
"""

from collections.abc import Callable

from torch import Tensor

from . import cpu
from .cpu import (
    WIDE,
    Run,
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
    "delta_matmul",
    "delta_normal",
    "delta_rmatmul",
    "difference",
    "fullrank_update",
    "key_of",
    "lowrank_update",
    "sum_of_squares",
    "tiling",
]


def delta_matmul(
    w1: Tensor,
    w0: Tensor,
    x: Tensor,
    *,
    scale: float = 1.0,
    squares: list[float] | None = None,
    run: Run = in_order,
) -> Tensor:
    """(W1 - W0) * scale @ X, (m, n) and (n, l) -> (m, l): `cpu.delta_matmul` or `gpu.delta_matmul`.

    `squares`, if given, receives sums of squares of the difference that add up to the whole: numbers, for which the
    host waits where a GPU computes. `run` spreads the tasks on a CPU.
    """
    if w1.device.type == "cpu":
        return cpu.delta_matmul(w1, w0, x, scale=scale, squares=squares, run=run)
    from .gpu import delta_matmul as away

    return _product(away.delta_matmul, w1, w0, x, scale, squares)


def delta_rmatmul(
    w1: Tensor,
    w0: Tensor,
    y: Tensor,
    *,
    scale: float = 1.0,
    squares: list[float] | None = None,
    run: Run = in_order,
) -> Tensor:
    """(W1 - W0).T * scale @ Y, (m, n) and (m, l) -> (n, l); `squares` and `run` as in `delta_matmul`."""
    if w1.device.type == "cpu":
        return cpu.delta_rmatmul(w1, w0, y, scale=scale, squares=squares, run=run)
    from .gpu import delta_rmatmul as away

    return _product(away.delta_rmatmul, w1, w0, y, scale, squares)


def delta_normal(
    w1: Tensor, w0: Tensor, x: Tensor, *, scale: float = 1.0, run: Run = in_order
) -> tuple[Tensor, Tensor]:
    """Y = (W1 - W0) * scale @ X and (W1 - W0).T * scale @ Y; for rows of up to WIDE elements on a CPU."""
    if w1.device.type == "cpu":
        return cpu.delta_normal(w1, w0, x, scale=scale, run=run)
    y = delta_matmul(w1, w0, x, scale=scale)
    return y, delta_rmatmul(w1, w0, y, scale=scale)


def _product(
    away: Callable[..., Tensor], w1: Tensor, w0: Tensor, x: Tensor, scale: float, squares: list[float] | None
) -> Tensor:
    """A GPU's product; its sum of squares is waited for."""
    sums: list[Tensor] | None = None if squares is None else []
    product = away(w1, w0, x, scale=scale, squares=sums)
    if squares is not None:
        squares.extend(map(float, sums or ()))
    return product
