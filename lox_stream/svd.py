"""Truncated SVD by block Krylov iteration (Musco & Musco 2015), in the Golub-Kahan form.

The solver sees an operator and nothing else: no checkpoint, no kernel, no dtype but float32. It keeps an orthonormal
basis on either side, extends them in turn by one product each, and looks at the operator's small projection after
every product:

    A P = Q T     after a product with A      (P: (n, p), Q: (m, q), both orthonormal; T: (q, p))
    A'Q = P M'    after a product with A'     (M: (q, p))

The singular triplets of T or M, carried back through Q and P, are the best that the space can give ("project on all
blocks"). One of the two residuals of such a triplet is zero, and the other is bounded without another product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lox_stream.costs import basis_columns, block_width

EPS = torch.finfo(torch.float32).eps
DEFLATION = 8 * EPS  # directions below this share of |A|_2 are rounding, not matrix
WELL_APART = 1e-3  # least pivot of a Gram matrix's Cholesky factor: its inverse then costs three digits of float64's 16
ROUNDING = 4 * EPS  # what float32 products leave in a triplet, as a share of s_1
NO_GAP = 1e-5  # (s_k - s_(k+1)) / s_k that float32 cannot tell from zero


class Operator(Protocol):
    """A matrix (m, n) that can be multiplied. All tensors are float32."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def matmul(self, x: Tensor) -> Tensor:
        """A @ x: (n, l) -> (m, l)."""

    def rmatmul(self, y: Tensor) -> Tensor:
        """A.T @ y: (m, l) -> (n, l)."""

    def squared_norm(self) -> float:
        """|A|_F^2. Asked for after the first product, so that it can be taken on the way."""


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """The rank-k part `u @ diag(s) @ vh` of an operator, and what is known of it."""

    u: Tensor  # (m, k) float32
    s: Tensor  # (k,) float32, descending
    vh: Tensor  # (k, n) float32
    residual: float  # upper bound of max_i(|A v - s u|, |A' u - s v|) / s_1; rigorous up to rounding
    radius: tuple[float, ...]  # each s_i has a singular value of A within radius_i; rigorous up to rounding
    squared_norm: float  # |A|_F^2
    gap: float  # estimate of (s_k - s_(k+1)) / s_k
    error: float  # estimate of |rank-k part - u s vh|_F
    passes: int  # products with A or A'
    converged: bool  # `enough` was satisfied, or no more can be gained
    unique: bool  # False: s_k = s_(k+1) as far as float32 tells, and the rank-k part is one of many


def relative(tolerance: float) -> Callable[[float, float], bool]:
    """Stop when the predicted |E|_F is below `tolerance` times the rank-k part's own norm."""
    return lambda error, part: error <= tolerance * part


def truncated_svd(
    op: Operator,
    rank: int,
    *,
    generator: torch.Generator,
    enough: Callable[[float, float], bool] | None = None,
    max_columns: int | None = None,
) -> TruncatedSVD:
    """The `rank` leading singular triplets of `op`, 1 <= rank <= min(m, n).

    `enough(error, part)` decides when to stop, from the predicted |E|_F of the rank-k part and that part's own
    Frobenius norm; the default asks for a relative error of 1e-5. The bases grow to at most `max_columns` vectors a
    side (default `costs.basis_columns`): about 64 products at rank 6. Then the best result is returned with
    `converged=False`.

    >>> diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    >>> class Operator:
    ...     shape = (4, 4)
    ...     matmul = rmatmul = staticmethod(lambda x: diagonal @ x)
    ...     squared_norm = staticmethod(lambda: float(diagonal.square().sum()))
    >>> truncated_svd(Operator(), 2, generator=torch.Generator().manual_seed(0)).s.round(decimals=4).tolist()
    [3.0, 2.0]

    Costs one product a pass, (m + n) * 4 bytes a basis column, and deterministic bits for a given generator state,
    operator and one torch thread.

    Source: Musco & Musco 2015, alg. 2; Golub, Luk & Overton 1981 for the bidiagonal form; Stathopoulos & Wu 2002 for
    the orthonormalisation.
    """
    m, n = op.shape
    width = block_width(m, n, rank)
    columns = max_columns or basis_columns(m, n, rank)
    enough = enough or relative(1e-5)
    right, left = _Basis(n, columns), _Basis(m, columns)
    start = torch.randn(width, n, generator=generator)
    right.extend(start, 0.0)
    watch = _Watch(rank)
    forward = torch.zeros(columns, columns, dtype=torch.float64)  # T
    backward = torch.zeros(columns, columns, dtype=torch.float64)  # M
    passes = 0
    exhausted = False
    # A product with A for the newest right block, then one with A' for the newest left block, and so on.
    while min(left.size + right.fresh, m) <= columns:
        rows = left.extend(op.matmul(right.newest.T).T, watch.norm)
        forward[: left.size, right.size - right.fresh : right.size] = rows.T
        passes += 1
        exhausted = not left.fresh or right.size == n  # then A = A PP' = Q T P'
        if exhausted or passes > 1:
            watch.look(forward[: left.size, : right.size], op.squared_norm(), fresh_rows=left.fresh)
        if exhausted or (passes > 3 and watch.settled(enough)):
            break
        if min(right.size + left.fresh, n) > columns:
            break
        rows = right.extend(op.rmatmul(left.newest.T).T, watch.norm)
        backward[left.size - left.fresh : left.size, : right.size] = rows
        passes += 1
        exhausted = not right.fresh or left.size == m  # then A = QQ'A = Q M P'
        watch.look(backward[: left.size, : right.size], op.squared_norm(), fresh_columns=right.fresh)
        if exhausted or (passes > 3 and watch.settled(enough)):
            break
    watch.exhausted = exhausted
    return watch.result(left, right, enough, passes)


class _Basis:
    """Orthonormal vectors of one length, kept as rows and extended block by block."""

    def __init__(self, length: int, columns: int) -> None:
        self.rows = torch.empty(columns, length)
        self.size = 0
        self.fresh = 0  # rows that the last extension added

    @property
    def newest(self) -> Tensor:
        return self.rows[self.size - self.fresh : self.size]

    def extend(self, block: Tensor, norm: float) -> Tensor:
        """Orthogonalise the rows of `block` (b, length) against all rows here and append what is new.

        Returns the coefficients (b, new size), float64, of the block in the extended basis. Directions under
        DEFLATION of `norm`, or of the longest row, are dropped: fewer than b rows may be added. Each of the two
        sweeps projects and then normalises, so that what cancellation left of the old rows is removed at unit length.
        """
        old = self.rows[: self.size]
        first, block, r1 = _sweep(block, old, norm)
        second, block, r2 = _sweep(block, old, 1.0)
        self.fresh = block.shape[0]
        self.rows[self.size : self.size + self.fresh] = block
        self.size += self.fresh
        return torch.cat([first + r1 @ second, r1 @ r2], dim=1)


def _sweep(block: Tensor, old: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Project `block` (b, length) off `old` (q, length) and orthonormalise: (coefficients, new rows, R).

    block = coefficients @ old + R @ rows, directions under DEFLATION of `norm` left out. The Cholesky factor of the
    Gram matrix serves where the rows are well apart; else its eigenvectors do (SVQB), which show the rank and cannot
    fail. In float64, so that R @ rows gives the block back to float32 whatever R's condition; and the eigenvectors
    without scaling the rows, so that one that is all rounding has no weight.
    """
    coefficients = block @ old.T
    block = block.addmm(coefficients, old, alpha=-1)
    wide = block.double()
    gram = wide @ wide.T
    lengths = gram.diagonal().sqrt()
    longest, shortest = (float(lengths.max()), float(lengths.min())) if lengths.numel() else (0.0, 0.0)
    floor = DEFLATION * max(norm, longest)
    room = old.shape[1] - old.shape[0]  # dimensions left; rounding must not pass for more of them
    if shortest * WELL_APART > floor and block.shape[0] <= room:
        factor, failed = torch.linalg.cholesky_ex(gram / (lengths[:, None] * lengths))
        if not int(failed) and float(factor.diagonal().min()) > WELL_APART:
            inverse = torch.linalg.solve_triangular(factor, torch.diag(1 / lengths), upper=False)
            return coefficients.double(), (inverse @ wide).float(), lengths[:, None] * factor
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    solid = roots > floor
    solid[: max(block.shape[0] - room, 0)] = False  # eigenvalues ascend
    roots, vectors = roots[solid], vectors[:, solid]
    return coefficients.double(), ((vectors / roots).T @ wide).float(), vectors * roots


class _Watch:
    """Follows the rank-k part from product to product and predicts how far it still is from the true one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.norm = 0.0  # running estimate of |A|_2
        self.steps: list[float] = []  # |B_p - B_(p-1)|_F
        self.u = self.us = self.vh = torch.zeros(0, 0, dtype=torch.float64)
        self.s = torch.zeros(0, dtype=torch.float64)
        self.radius = torch.zeros(0, dtype=torch.float64)
        self.squared_norm = 0.0
        self.exhausted = False  # the space is invariant: the projection is the matrix itself

    def look(self, small: Tensor, squared_norm: float, fresh_rows: int = 0, fresh_columns: int = 0) -> None:
        """Take the triplets of the newest projection; `fresh_*` of its rows or columns met no product yet."""
        u, s, vh = _triplets(small, self.rank + 1)
        k = min(self.rank, s.shape[0])
        self.steps.append(_distance(u[:, :k] * s[:k], vh[:k], self.us, self.vh))
        self.u, self.s, self.vh, self.us = u[:, :k], s[:k], vh[:k], u[:, :k] * s[:k]
        self.next = float(s[k]) if s.shape[0] > k else 0.0
        self.norm = float(s[0]) if s.shape[0] else 0.0
        self.squared_norm = squared_norm
        # The residual on the side not yet multiplied is (I - QQ')A applied to the fresh part of v (or its mirror).
        fresh = u[u.shape[0] - fresh_rows :] if fresh_rows else vh[:, vh.shape[1] - fresh_columns :].T
        missed = math.sqrt(max(squared_norm - float(small.square().sum()), 0.0))
        radius = torch.linalg.vector_norm(fresh, dim=0) * missed + ROUNDING * self.norm
        self.radius, self.next_radius = radius[:k], float(radius[k]) if radius.shape[0] > k else 0.0

    @property
    def part(self) -> float:
        return float(torch.linalg.vector_norm(self.s))

    @property
    def error(self) -> float:
        """Estimate of |E|_F now: the last step, carried on as a series at the slowest rate seen lately.

        The steps to come add up to d * r / (1 - r) if they all point one way and to d * r / sqrt(1 - r^2) if each is
        orthogonal to the others. Measured over eleven spectra (tests/test_svd.py), the truth lies between;
        d * r / sqrt(1 - r) is within a factor of two of it, and errs upwards where convergence is fast.
        """
        if self.exhausted:
            return ROUNDING * self.part
        d2, d1, d0 = ([math.inf, math.inf, *self.steps])[-3:]
        if d0 == 0.0:
            return ROUNDING * self.part
        rate = max(d0 / d1, math.sqrt(d0 / d2)) if d1 and d2 else 1.0
        rate = min(rate, 0.999)
        return math.hypot(d0 * rate / math.sqrt(1 - rate), ROUNDING * self.part)

    @property
    def _last(self) -> float:
        """s_k, zero where fewer than k values are above rounding."""
        return float(self.s[-1]) if self.s.shape[0] == self.rank else 0.0

    @property
    def gap(self) -> float:
        last = self._last
        return (last - self.next) / last if last > 0 else 1.0

    @property
    def unique(self) -> bool:
        """False when the k-th and the next value are both settled and equal."""
        last = self._last
        if last <= DEFLATION * self.norm or self.gap > NO_GAP:
            return True
        return max(float(self.radius[-1]), self.next_radius) > 0.01 * last

    def settled(self, enough: Callable[[float, float], bool]) -> bool:
        return enough(self.error, self.part) or not self.unique

    def result(self, left: _Basis, right: _Basis, enough: Callable[[float, float], bool], passes: int) -> TruncatedSVD:
        u = left.rows[: self.u.shape[0]].T @ self.u.float()
        vh = self.vh.float() @ right.rows[: self.vh.shape[1]]
        top = max(self.norm, torch.finfo(torch.float32).tiny)
        return TruncatedSVD(
            u=u,
            s=self.s.float(),
            vh=vh,
            residual=max(self.radius.tolist(), default=0.0) / top,
            radius=tuple(self.radius.tolist()),
            squared_norm=self.squared_norm,
            gap=self.gap,
            error=self.error,
            passes=passes,
            converged=self.settled(enough),
            unique=self.unique,
        )


def _triplets(small: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `count` singular triplets of a small float64 matrix that are above its rounding.

    Through the Gram matrix of the short side, in half the time of an SVD. Squaring costs nothing here: values under
    1e-8 of the largest are float32 rounding to us.
    """
    if small.shape[0] > small.shape[1]:
        v, s, uh = _triplets(small.T, count)
        return uh.T, s, v.T
    values, vectors = torch.linalg.eigh(small @ small.T)
    s = values[-count:].flip(0).clamp(min=0).sqrt()
    s = s[s > DEFLATION * s[0]] if s.shape[0] else s
    u = vectors[:, vectors.shape[1] - s.shape[0] :].flip(1)
    return u, s, (u.T @ small) / s[:, None]


def _distance(us: Tensor, vh: Tensor, before_us: Tensor, before_vh: Tensor) -> float:
    """|us @ vh - before_us @ before_vh|_F, the earlier factors being those of a leading corner."""
    difference = us @ vh
    difference[: before_us.shape[0], : before_vh.shape[1]].addmm_(before_us, before_vh, alpha=-1)
    return float(torch.linalg.vector_norm(difference))
