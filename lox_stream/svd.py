"""Truncated SVD by block Krylov iteration (Musco & Musco 2015).

The solver sees operators and nothing else: no checkpoint, no kernel, no dtype but float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_stream.convergence import Enough
from lox_stream.costs import MOST_BLOCKS, basis_columns, block_width
from lox_stream.krylov import Run, iterate
from lox_stream.operators import Operator, Turned

SMALLEST = 2.0**-149  # float32 number: so much may a value be off that is rounded among them
OBLONG = 8  # times as wide as high: the basis on the columns would cost more than one pass for two products saves


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """The rank-k part `u @ diag(s) @ vh` of an operator, and what is known of it."""

    u: Tensor  # (m, k) float32, on the operator's device
    s: Tensor  # (k,) float32, descending, on the host
    vh: Tensor  # (k, n) float32, on the operator's device
    residual: float  # upper bound of max_i(|A v - s u|, |A' u - s v|) / s_1; rigorous up to rounding
    radius: tuple[float, ...]  # each s_i has a singular value of A within radius_i; rigorous up to rounding
    squared_norm: float  # |A|_F^2
    gap: float  # estimate of (s_k - s_(k+1)) / s_k
    error: float  # estimate of |rank-k part - u s vh|_F
    passes: int  # over A: for a product with A or A', or for both at once
    converged: bool  # `enough` was satisfied, or there is no gap to resolve
    unique: bool  # False: s_k = s_(k+1) as far as float32 tells, and the rank-k part is one of many


def transposed(svd: TruncatedSVD) -> TruncatedSVD:
    """That of A.T."""
    return replace(svd, u=svd.vh.T, vh=svd.u.T)


def relative(tolerance: float) -> Enough:
    """Stop when the predicted |E|_F is below `tolerance` times the rank-k part's own norm."""
    return lambda error, part: error <= tolerance * part


def truncated_svd(
    op: Operator,
    rank: int,
    *,
    generator: torch.Generator,
    enough: Enough | None = None,
    max_blocks: int = MOST_BLOCKS,
) -> TruncatedSVD:
    """The `rank` leading singular triplets of `op`, 1 <= rank <= min(m, n); of those, all that rounding leaves.

    A matrix of lower rank has fewer (zero has none): values under 1e-6 of the first are rounding and not returned.
    Entries may be of any size that float32 holds. Raises DataError where a product or the norm is not finite.

    `enough(error, part)` decides when to stop, from the predicted |E|_F of the rank-k part and that part's own
    Frobenius norm; the default asks for a relative error of 1e-5. After `max_blocks` blocks
    of `costs.block_width` vectors, or when float32 has no more to give, the best result is returned with
    `converged=False`.

    >>> diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    >>> class Operator:
    ...     shape = (4, 4)
    ...     matmul = rmatmul = staticmethod(lambda x: diagonal @ x)
    ...     squared_norm = staticmethod(lambda: float(diagonal.square().sum()))
    >>> truncated_svd(Operator(), 2, generator=torch.Generator().manual_seed(0)).s.round(decimals=4).tolist()
    [3.0, 2.0]

    Costs one pass a product, or two products a pass where the operator has `normal`; (m + n) * 4 bytes a column of the
    basis (`costs.basis_columns`: 128 at most at rank 6); and deterministic bits for a given generator state, operator
    and one torch thread.

    Source: Musco & Musco 2015, alg. 2; Wu & Simon 2000 for beginning anew with the leading part of a full basis;
    Stathopoulos & Wu 2002 for the orthonormalisation.
    """
    stop = None if enough is None else [enough]
    return truncated_svds([op], rank, generators=[generator], enough=stop, max_blocks=max_blocks)[0]


def truncated_svds(
    ops: Sequence[Operator],
    rank: int,
    *,
    generators: Sequence[torch.Generator],
    enough: Sequence[Enough] | None = None,
    max_blocks: int = MOST_BLOCKS,
) -> list[TruncatedSVD]:
    """`truncated_svd` of each of `ops`, which have one shape; a generator and an `enough` for each."""
    m, n = ops[0].shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank is {rank}, expected 1 to {min(m, n)} for a matrix of {(m, n)}")
    width = block_width(m, n, rank)
    if max_blocks < 1:
        raise ValueError(f"max_blocks is {max_blocks}, expected 1 or more")
    turned = m < n and not (n <= OBLONG * m and all(hasattr(op, "normal") for op in ops))
    stops = enough or [relative(1e-5)] * len(ops)
    given = zip(ops, generators, stops, strict=True)
    runs = [Run(Turned(op) if turned else op, rank, generator, stop) for op, generator, stop in given]
    iterate(runs, rank, width, basis_columns(m, n, rank), max_blocks)
    found = [_result(run) for run in runs]
    return [transposed(svd) for svd in found] if turned else found


def _result(run: Run) -> TruncatedSVD:
    assert run.factors is not None, "each matrix leaves the iteration with its factors"
    u, s, v = run.factors
    watch, scale = run.watch, run.scale
    radius = tuple(radius / scale + SMALLEST for radius in watch.radius)
    return TruncatedSVD(
        u=u.T,
        s=s / scale,
        vh=v,
        residual=max(radius) * scale / watch.norm if radius else 0.0,
        radius=radius,
        squared_norm=run.op.squared_norm(),
        gap=watch.gap,
        error=watch.error / scale,
        passes=run.passes,
        converged=watch.converged(run.enough),
        unique=watch.unique,
    )
