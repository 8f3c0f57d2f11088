"""Orthonormal rows in float32, for stacks of blocks that go in step: what is dropped becomes a row of zeros.

Source: Stathopoulos & Wu 2002 (SVQB), Cholesky where that is safe; Parlett 1980 ("twice is enough") for projecting.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
DEFLATION = 8 * EPS  # directions below this share of the largest are rounding, not matrix
WELL_APART = 1e-3  # least pivot of a Gram matrix's Cholesky factor: its inverse then costs three digits of float64's 16
MUCH_LEFT = 1e-2  # share of a row that a projection leaves at least, for it to be off the others by 1e-5


def orthonormal(block: Tensor, old: Tensor, norm: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that, with the orthonormal rows `old` (c, q, length), span those of `block` (c, b, length) too.

    Directions of `block` outside `old` under DEFLATION of `norm` (c,), or of the longest row, are dropped, and so are
    the weakest ones over `room` (c,): rows of zeros stand in their place, and the second result (c, b) is False there.
    A second projection removes, at unit length, what cancellation left of the old rows; where that was much, the rows
    are normalised again.
    """
    wide = off(block, old).double()
    turn, solid, left = normalising(wide @ wide.mT, norm, room)
    block = off((turn @ wide).float(), old)
    little = left < MUCH_LEFT
    if bool(little.any()):
        wide = block[little].double()
        turn, solid[little], _ = normalising(wide @ wide.mT, torch.ones_like(norm[little]), room[little])
        block[little] = (turn @ wide).float()
    return block, solid


def off(block: Tensor, old: Tensor) -> Tensor:
    """Rows less what they have of the orthonormal rows `old`."""
    return torch.baddbmm(block, block @ old.mT, old, alpha=-1) if old.shape[1] else block


def normalising(gram: Tensor, norm: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices T (c, b, b) that make rows with these Gram matrices (c, b, b) orthonormal, but for rows of zeros.

    Also which rows T makes (c, b), and the least share (c,) of `norm` that a given row has outside the others.

    The Cholesky factor serves where the rows are well apart; else the eigenvectors do (SVQB), which show the rank and
    cannot fail; without scaling the rows, so that one that is all rounding has no weight.
    """
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    norm = torch.maximum(norm, lengths.amax(1))
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2)
    apart = (failed == 0) & ((pivots / lengths).amin(1) > WELL_APART)
    apart &= (lengths.amin(1) * WELL_APART > DEFLATION * norm) & (room >= gram.shape[1])
    turn = torch.linalg.solve_triangular(factor, torch.eye(gram.shape[1], dtype=gram.dtype), upper=False)
    solid, left = torch.ones_like(lengths, dtype=torch.bool), pivots.amin(1) / norm
    if not bool(apart.all()):
        near = ~apart
        turn[near], solid[near] = _by_eigenvectors(gram[near], DEFLATION * norm[near], room[near])
        left[near] = 0.0
    return turn, solid, left


def _by_eigenvectors(gram: Tensor, floor: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    count = gram.shape[1]
    solid = (roots > floor[:, None]) & (torch.arange(count) >= count - room[:, None])  # eigenvalues ascend
    return (vectors * torch.where(solid, 1 / roots, 0.0)[:, None]).mT, solid
