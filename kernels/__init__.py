"""The operations on a pair of weights, chosen by the device that holds them.

    delta_matmul(w1, w0, x)        (W1 - W0) @ X
    delta_rmatmul(w1, w0, y)       (W1 - W0).T @ Y
    delta_normal(w1, w0, x)        both in one pass: Y = (W1 - W0) @ X and (W1 - W0).T @ Y
    lowrank_update(w1, us, vh)     round(W1 + US @ Vh), with what the rounding left of the update

and `fullrank_update`, which needs no factors. This folder imports nothing of `lox_stream`.
"""

from .cpu import (
    WIDE,
    delta_matmul,
    delta_normal,
    delta_rmatmul,
    difference,
    fullrank_update,
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
