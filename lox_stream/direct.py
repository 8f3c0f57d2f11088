"""The rank-k part of a matrix by LAPACK: where it is asked for, and where no iteration would be faster."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lox_stream.bases import DEFLATION
from lox_stream.convergence import UNITS
from lox_stream.svd import TruncatedSVD, transposed

NO_GAP = 1e-12  # (s_k - s_(k+1)) / s_k that float64 cannot tell from zero
GRAM_BAND = 64  # rows of a Gram matrix that are computed at a time


def exact_svd(a: Tensor, rank: int) -> TruncatedSVD:
    """The rank-k part of `a` (m, n) float64 by the full SVD. `costs.exact_bytes` of memory."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    after = float(s[rank]) if len(s) > rank else 0.0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return _found(a, u, s, vh, 0.0, after, float(a.square().sum()))


def gram_svd(a: Tensor, rank: int) -> TruncatedSVD:
    """The same by all eigenvectors of the Gram matrix of the short side, in the dtype of `a`, float32 or float64.

    Squaring costs half of that dtype's digits, so the error grows with the square of s_1 / s_k. It is estimated from
    what the projection of `a` on the eigenvectors leaves. Values under 1e-6 of the first are rounding, as in
    `truncated_svd`, and not returned. `costs.gram_bytes` of memory.
    """
    if a.shape[0] > a.shape[1]:
        return transposed(gram_svd(a.T, rank))
    gram = _lower_gram(a)
    squares, vectors = torch.linalg.eigh(gram)
    u = torch.linalg.qr(vectors[:, -rank:].flip(1).double())[0]
    q, r = torch.linalg.qr((u.T.to(a.dtype) @ a).double().T)  # LAPACK's SVD of few long rows takes twice as long
    left, s, turn = torch.linalg.svd(r.T)
    vh = turn @ q.T
    after = math.sqrt(max(float(squares[-rank - 1]), 0.0)) if len(squares) > rank else 0.0
    return _found(a, u @ left, s, vh, DEFLATION, after, float(gram.diagonal().double().sum()))


def _lower_gram(a: Tensor) -> Tensor:
    """The Gram matrix of the rows of `a` (m, n), as `eigh` reads it: without what lies above the diagonal."""
    if len(a) <= GRAM_BAND:
        return a @ a.T
    gram = a.new_zeros(len(a), len(a))
    for top in range(0, len(a), GRAM_BAND):
        band = slice(top, top + GRAM_BAND)
        gram[band, : band.stop] = a[band] @ a[: band.stop].T
    return gram


def _found(a: Tensor, u: Tensor, s: Tensor, vh: Tensor, least: float, after: float, squares: float) -> TruncatedSVD:
    """Of factors with A'u = s v up to rounding: the triplets over `least` of the first.

    `after` is s_(k+1), or an estimate of it, and `squares` |A|_F^2.
    """
    values = s.tolist()
    values = [value for value in values if value > least * values[0]]
    u, s, vh = u[:, : len(values)], s[: len(values)], vh[: len(values)]
    if not values:
        return TruncatedSVD(u, s, vh, 0.0, (), squares, 1.0, 0.0, 0, converged=True, unique=True)
    across = torch.linalg.vector_norm((vh.to(a.dtype) @ a.T).double() - (u * s).T, dim=1)
    radius = (across + UNITS * torch.finfo(a.dtype).eps * values[0]).tolist()
    last, left = values[-1], math.hypot(*radius)
    gap = (last - after) / last
    return TruncatedSVD(
        u=u,
        s=s,
        vh=vh,
        residual=max(radius) / values[0],
        radius=tuple(radius),
        squared_norm=squares,
        gap=gap,
        error=left / max(gap, NO_GAP),
        passes=0,
        converged=True,
        unique=gap > max(NO_GAP, left / last),
    )
