"""Truncated SVD by block Krylov iteration (Musco & Musco 2015).

The solver sees an operator and nothing else: no checkpoint, no kernel, no dtype but float32. On A's short side (here
the right one) it grows an orthonormal basis P (n, p) of the Krylov space of A'A, and keeps the images A P. Their small
Gram matrix, in float64, gives the best rank-k part that the space holds ("project on all blocks"):

    (A P)'(A P) y = s^2 y        v = P y        u = A P y / s

so A v = s u by construction, and the residual on the other side is bounded without another product.
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
DEFLATION = 8 * EPS  # directions below this share of the largest are rounding, not matrix
WELL_APART = 1e-3  # least pivot of a Gram matrix's Cholesky factor: its inverse then costs three digits of float64's 16
ROUNDING = 4 * EPS  # what float32 products leave in a triplet, as a share of s_1
GRAM_ROWS = 64
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
    converged: bool  # `enough` was satisfied, or there is no gap to resolve
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
    Frobenius norm; the default asks for a relative error of 1e-5. The basis grows to at most `max_columns` vectors
    (default `costs.basis_columns`): 65 products at rank 6. Then, or when float32 has no more to give, the best result
    is returned with `converged=False`.

    >>> diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    >>> class Operator:
    ...     shape = (4, 4)
    ...     matmul = rmatmul = staticmethod(lambda x: diagonal @ x)
    ...     squared_norm = staticmethod(lambda: float(diagonal.square().sum()))
    >>> truncated_svd(Operator(), 2, generator=torch.Generator().manual_seed(0)).s.round(decimals=4).tolist()
    [3.0, 2.0]

    Costs one product a pass, (m + n) * 4 bytes a basis column, and deterministic bits for a given generator state,
    operator and one torch thread.

    Source: Musco & Musco 2015, alg. 2; Stathopoulos & Wu 2002 for the orthonormalisation.
    """
    if not 1 <= rank <= min(op.shape):
        raise ValueError(f"rank is {rank}, expected 1 to {min(op.shape)} for a matrix of {op.shape}")
    wide = op.shape[0] < op.shape[1]
    forward, backward = (op.rmatmul, op.matmul) if wide else (op.matmul, op.rmatmul)
    n, m = sorted(op.shape)
    width = block_width(m, n, rank)
    columns = max_columns or basis_columns(m, n, rank)
    if columns < width:
        raise ValueError(f"max_columns is {columns}, expected {width} or more: a block at rank {rank}")
    enough = enough or relative(1e-5)
    basis = torch.empty(columns, n, dtype=torch.float32)  # P'
    image = torch.empty(columns, m, dtype=torch.float32)  # (A P)'
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    watch = _Watch(rank)
    start = torch.randn(width, m, generator=generator, dtype=torch.float32)
    block = orthonormal(backward(start.T).T, basis[:0], 0.0)
    size, passes = 0, 1
    while block.shape[0] and size + block.shape[0] <= columns:
        old, size = size, size + block.shape[0]
        basis[old:size] = block
        image[old:size] = forward(block.T).T
        newest = image[old:size].double()
        for top in range(0, size, GRAM_ROWS):  # in float64, some at a time
            rows = slice(top, min(top + GRAM_ROWS, size))
            gram[old:size, rows] = newest @ image[rows].double().T
        gram[:old, old:size] = gram[old:size, :old].T
        passes += 1
        watch.look(gram[:size, :size], size - old, op.squared_norm())
        if size == n or watch.settled(enough):
            break
        turned = _sweep(image[old:size], image[:0], watch.norm)  # else the product would square the condition
        block = orthonormal(backward(turned.T).T, basis[:size], watch.norm)
        passes += 1
    if size == n or not block.shape[0]:
        watch.exhaust()
    long, short = image[:size], basis[:size]
    return watch.result((short, long) if wide else (long, short), wide, enough, passes)


def orthonormal(block: Tensor, old: Tensor, norm: float) -> Tensor:
    """Orthonormal rows that, with the orthonormal rows `old` (q, length), span those of `block` (b, length) too.

    Directions of `block` outside `old` under DEFLATION of `norm`, or of the longest row, are dropped: fewer than b rows
    may come back. Each of the two sweeps projects and then normalises, so that what cancellation left of the old rows
    is removed at unit length.
    """
    return _sweep(_sweep(block, old, norm), old, 1.0)


def _sweep(block: Tensor, old: Tensor, norm: float) -> Tensor:
    """Project `block` (b, length) off `old` (q, length) and orthonormalise what is left.

    The Cholesky factor of the Gram matrix serves where the rows are well apart; else its eigenvectors do (SVQB), which
    show the rank and cannot fail; without scaling the rows, so that one that is all rounding has no weight.
    """
    block = block.addmm(block @ old.T, old, alpha=-1)
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
            block = inverse @ wide
            return block.float()
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    solid = roots > floor
    solid[: max(block.shape[0] - room, 0)] = False  # eigenvalues ascend
    block = (vectors[:, solid] / roots[solid]).T @ wide
    return block.float()


class _Watch:
    """Follows the rank-k part from look to look and predicts how far it still is from the true one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.norm = 0.0  # running estimate of |A|_2, from below
        self.steps: list[float] = []  # |B - earlier B|_F, a look apart
        self.y = torch.zeros(0, 0, dtype=torch.float64)
        self.s = torch.zeros(0, dtype=torch.float64)
        self.radius = torch.zeros(0, dtype=torch.float64)
        self.next = self.next_radius = 0.0  # of s_(k+1)
        self.squared_norm = 0.0
        self.exhausted = False

    def look(self, gram: Tensor, fresh: int, squared_norm: float) -> None:
        """Take the leading eigenpairs of the images' Gram matrix; its last `fresh` columns are of the newest block."""
        values, vectors = torch.linalg.eigh(gram)
        s = values[-self.rank - 1 :].flip(0).clamp(min=0).sqrt()
        s = s[s > DEFLATION * s[0]]
        y = vectors[:, vectors.shape[1] - s.shape[0] :].flip(1)
        k = min(self.rank, s.shape[0])
        # |B - B'|^2 = |B|^2 + |B'|^2 - 2 <B, B'>, with B = A P y y' P'; eight digits are enough
        inner = (y[: self.y.shape[0], :k].T @ self.y) * (y[:, :k].T @ gram[:, : self.y.shape[0]] @ self.y)
        step = s[:k].square().sum() + self.s.square().sum() - 2 * inner.sum()
        self.steps.append(math.sqrt(max(float(step), 0.0)))
        # The residual A'u - s v is (I - PP')A' applied to the newest images' share of u: earlier ones lie in the space
        newest = (y[-fresh:] * (gram[-fresh:, -fresh:] @ y[-fresh:])).sum(0).clamp(min=0).sqrt() / s
        missed = math.sqrt(max(squared_norm - float(gram.diagonal().sum()), 0.0))
        self.norm = float(s[0]) if s.shape[0] else 0.0
        radius = newest * missed + self._rounding(s)
        self.y, self.s, self.radius = y[:, :k], s[:k], radius[:k]
        self.next, self.next_radius = (float(s[k]), float(radius[k])) if s.shape[0] > k else (0.0, 0.0)
        self.squared_norm = squared_norm

    def _rounding(self, s: Tensor) -> Tensor:
        """What float32, and the directions that were dropped, leave in the residual of each value."""
        return ROUNDING * self.norm + DEFLATION * self.norm**2 / s

    def exhaust(self) -> None:
        """The space is invariant: the last look saw the matrix itself, up to rounding."""
        self.exhausted = True
        self.radius, self.next_radius = self._rounding(self.s), 0.0

    @property
    def part(self) -> float:
        return float(torch.linalg.vector_norm(self.s))

    @property
    def error(self) -> float:
        """Estimate of |E|_F now: the last step, carried on as a series at the slowest rate seen lately.

        The steps to come add up to d * r / (1 - r) if they all point one way and to d * r / sqrt(1 - r^2) if each is
        orthogonal to the others. Measured over ten spectra (tests/test_svd.py), the truth lies between;
        d * r / sqrt(1 - r) is within a factor of three of it, and errs upwards where convergence is fast.
        """
        return math.hypot(self._to_come, self._floor)

    @property
    def _to_come(self) -> float:
        """What further products would change."""
        if self.exhausted:
            return 0.0
        d2, d1, d0 = ([math.inf, math.inf, *self.steps])[-3:]
        if d0 == 0.0:
            return 0.0
        rate = max(d0 / d1, math.sqrt(d0 / d2)) if d1 and d2 else 1.0
        rate = min(rate, 0.999)
        return d0 * rate / math.sqrt(1 - rate)

    @property
    def _floor(self) -> float:
        """What they would not: float32 rounding, which turns the k-th direction the more the smaller the gap is."""
        return ROUNDING * self.part + 0.25 * EPS * self.norm / max(self.gap, NO_GAP)

    @property
    def _last(self) -> float:
        """s_k, zero where fewer than k values are above rounding."""
        return float(self.s[-1]) if self.s.shape[0] == self.rank else 0.0

    @property
    def gap(self) -> float:
        return (self._last - self.next) / self._last if self._last > 0 else 1.0

    @property
    def unique(self) -> bool:
        """False when the k-th and the next value are both settled and equal."""
        if self._last <= DEFLATION * self.norm or self.gap > NO_GAP:
            return True
        return max(float(self.radius[-1]), self.next_radius) > 0.01 * self._last

    def converged(self, enough: Callable[[float, float], bool]) -> bool:
        return enough(self.error, self.part) or not self.unique

    def settled(self, enough: Callable[[float, float], bool]) -> bool:
        """Converged, or as near to it as float32 comes; three looks at least, for two steps make a rate."""
        return len(self.steps) > 2 and (self.converged(enough) or self._to_come < 0.5 * self._floor)

    def result(
        self, sides: tuple[Tensor, Tensor], wide: bool, enough: Callable[[float, float], bool], passes: int
    ) -> TruncatedSVD:
        """`sides` are left and right rows, (A P)' and P' or, if `wide`, P' and (A P)'."""
        count = self.y.shape[0]
        of_basis, of_image = self.y.T.float(), (self.y / self.s).T.float()
        left, right = (of_basis, of_image) if wide else (of_image, of_basis)
        return TruncatedSVD(
            u=(left @ sides[0][:count]).T,
            s=self.s.float(),
            vh=right @ sides[1][:count],
            residual=max(self.radius.tolist(), default=0.0) / max(self.norm, torch.finfo(torch.float32).tiny),
            radius=tuple(self.radius.tolist()),
            squared_norm=self.squared_norm,
            gap=self.gap,
            error=self.error,
            passes=passes,
            converged=self.converged(enough),
            unique=self.unique,
        )
