"""Orthonormal rows in float32, for stacks of blocks that go in step: what is dropped becomes a row of zeros.

Source: Stathopoulos & Wu 2002 (SVQB); Parlett 1980 ("twice is enough") for projecting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lox_stream.operators import upload

EPS = torch.finfo(torch.float32).eps
DEFLATION = 8 * EPS  # directions below this share of the largest are rounding, not matrix
MUCH_LEFT = 1e-2  # share of a row that a projection leaves at least, for it to be off the others by 1e-5
TWICE = 0.5  # share that a second projection leaves at least of a row that is more than rounding


def orthonormal(block: Tensor, old: Tensor, norm: Sequence[float], room: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Orthonormal rows that, with the orthonormal rows `old` (c, q, length), span those of `block` (c, b, length) too.

    Directions of `block` outside `old` under DEFLATION of its `norm`, or of its longest row, are dropped, and so are
    the weakest ones over its `room`: rows of zeros stand in their place. The second result tells how many are left.
    A second projection removes, at unit length, what cancellation left of the old rows; where that was much, the rows
    are normalised again. A row of which it takes more than half was rounding, and is dropped.
    """
    wide = off(block, old).double()
    turn, found, left = normalising((wide @ wide.mT).cpu(), norm, room)
    block = off((upload(turn, wide.device) @ wide).float(), old)
    little = [i for i, share in enumerate(left) if share < MUCH_LEFT]
    if little:
        wide = block[little].double()
        most = [found[i] for i in little]
        turn, again, _ = normalising((wide @ wide.mT).cpu(), [1.0] * len(little), most, TWICE)
        block[little] = (upload(turn, wide.device) @ wide).float()
        for i, count in zip(little, again, strict=True):
            found[i] = count
    return block, found


def off(block: Tensor, old: Tensor) -> Tensor:
    """Rows less what they have of the orthonormal rows `old`."""
    return torch.baddbmm(block, block @ old.mT, old, alpha=-1) if old.shape[1] else block


def normalising(
    gram: Tensor, norm: Sequence[float], room: Sequence[int], share: float = DEFLATION
) -> tuple[Tensor, list[int], list[float]]:
    """Matrices T (c, b, b) that make rows with these Gram matrices (c, b, b) orthonormal, but for rows of zeros; all on
    the host.

    A direction counts where the given rows have more than a `share` of `norm`, or of the longest row, in it. Also how
    many rows T makes, and the least such share among them.

    By eigenvectors, which show the rank and cannot fail; without scaling the rows, so that one that is all rounding
    has no weight. Some numbers of each matrix are done in Python, which takes no longer than a call of torch does.
    """
    values, vectors = torch.linalg.eigh(gram)
    inverses, found, left = [], [], []
    for squares, least, most in zip(values.tolist(), norm, room, strict=True):
        lengths = [math.sqrt(max(square, 0.0)) for square in squares]  # ascending
        largest = max(least, lengths[-1])
        kept = [length for length in lengths if length > share * largest][-most:] if most else []
        inverses.append([0.0] * (len(lengths) - len(kept)) + [1 / length for length in kept])
        found.append(len(kept))
        left.append(kept[0] / largest if kept else 1.0)
    return torch.tensor(inverses, dtype=gram.dtype).view(-1, gram.shape[1], 1) * vectors.mT, found, left
