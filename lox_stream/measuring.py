"""What is measured of one matrix: its leading directions, what rounding leaves of updates, what a fine-tuning left.

A matrix whose short side is at most WHOLE_SIDE is formed in float64 and has all its singular values taken; another is
multiplied in the solver's passes, as in a run, and its leading ones are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_stream.analysed import ROUNDINGS, Cell, Rounding
from lox_stream.bases import DEFLATION
from lox_stream.convergence import UNITS
from lox_stream.delta import Delta, NotFinite, first_not_finite
from lox_stream.kernels import lowrank_update
from lox_stream.kernels.cpu import TILE_ELEMENTS, Run, sum_of_squares
from lox_stream.merging import Change
from lox_stream.operators import Operator
from lox_stream.samples import Sample
from lox_stream.svd import relative, truncated_svd

WHOLE_SIDE = 1024  # short side up to which all singular values are taken: half a second at most
LOOSE = 1e-2  # relative error of the leading part: of its values that is 1e-4
LOOKED_AT = 1 << 20  # elements of a large matrix that retention is measured on
BANDS = 16  # of rows, at even distances

Form = Callable[[slice], Tensor]  # some rows of a matrix


@dataclass(frozen=True, slots=True)
class Leading:
    """The leading singular triplets of a matrix A (m, n), and what is known of the others."""

    u: Tensor  # (m, r) float32
    s: Tensor  # (r,) float64, falling
    vh: Tensor  # (r, n) float32
    values: tuple[float, ...]  # those of s, or all that are not rounding
    radius: tuple[float, ...]  # each of s has a singular value of A within it
    square: float  # |A|_F^2
    whole: bool  # the others are zero, or rounding


def leading(w1: Tensor, w0: Tensor, rank: int, seed: int, run: Run) -> Leading | None:
    """Of W1 - W0, two (m, n) weights; None where that is zero. Raises NotFinite."""
    if min(w1.shape) > WHOLE_SIDE:
        op = Delta(w1, w0, run, rms=Sample(w1, w0, w1.dtype).delta_rms)
        return _of_operator(op, rank, seed, lambda: op.scale)
    m, n = w1.shape
    found = _of_all(lambda band: w1[band].double() - w0[band].double(), m, n, rank)
    if found is not None and not math.isfinite(found.square):
        raise NotFinite(first_not_finite(w1, w0))
    return found


def of_change(change: Change) -> Leading | None:
    """Of a delta that is given by its singular value decomposition, all of it."""
    if not float(change.s[0]) > 0:
        return None
    kept = change.s > DEFLATION * change.s[0]
    s = change.s[kept]
    radius = (UNITS * torch.finfo(s.dtype).eps * float(s[0]),) * len(s)
    return Leading(
        change.u[:, kept].float(),
        s,
        change.vh[kept].float(),
        tuple(s.tolist()),
        radius,
        float(change.s.square().sum()),
        whole=True,
    )


def leading_of(form: Form, m: int, n: int, rank: int, seed: int, run: Run) -> Leading | None:
    """The same of a matrix that is formed some rows at a time."""
    if min(m, n) > WHOLE_SIDE:
        return _of_operator(Formed(form, m, n, run), rank, seed, lambda: 1.0)
    return _of_all(lambda band: form(band).double(), m, n, rank)


def _of_operator(op: Operator, rank: int, seed: int, scale: Callable[[], float]) -> Leading | None:
    """`scale()` is what the operator's matrix is multiplied with, once there was a product."""
    generator = torch.Generator().manual_seed(seed)
    found = truncated_svd(op, min(rank, *op.shape), generator=generator, enough=relative(LOOSE))
    if not len(found.s):
        return None
    by = scale()
    s = found.s.double() / by
    radius = tuple(one / by for one in found.radius)
    return Leading(found.u, s, found.vh, tuple(s.tolist()), radius, found.squared_norm / by**2, whole=False)


def _of_all(form: Form, m: int, n: int, rank: int) -> Leading | None:
    """By the eigenvectors of the short side's Gram matrix, in float64. Values under 1e-6 of the first are left out.

    Their squares are right to 1e-16 of the largest, which is less than what the weights' own rounding leaves of delta.
    A matrix that is not wide is formed some rows at a time, three times. `whole_bytes` of memory.
    """
    if m < n:
        turned = form(slice(0, m)).T
        found = _of_tall(lambda band: turned[band], n, m, rank)
        return found and replace(found, u=found.vh.T, vh=found.u.T)
    return _of_tall(form, m, n, rank)


def _bands(m: int, n: int) -> list[slice]:
    """All rows of an (m, n) matrix, a tile's elements at a time."""
    rows = max(1, TILE_ELEMENTS // n)
    return [slice(top, min(top + rows, m)) for top in range(0, m, rows)]


def _of_tall(form: Form, m: int, n: int, rank: int) -> Leading | None:
    bands = _bands(m, n)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for band in bands:
        a = form(band)
        gram += a.T @ a
    square = float(gram.diagonal().sum())
    if square == 0:
        return None
    if not math.isfinite(square):
        none = torch.empty(0, 0)
        return Leading(none, torch.empty(0), none, (), (), math.nan, whole=True)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_(min=0).sqrt_()
    values = values[values > DEFLATION * values[0]]
    v = vectors.flip(1)[:, : min(rank, len(values))]
    images = torch.cat([form(band) @ v for band in bands])
    s = torch.linalg.vector_norm(images, dim=0)
    u = images / s
    back = torch.zeros_like(v)
    for band in bands:
        back += form(band).T @ u[band]
    across = torch.linalg.vector_norm(back - v * s, dim=0)
    return Leading(u.float(), s, v.T.float(), tuple(values.tolist()), tuple(across.tolist()), square, whole=True)


def whole_bytes(m: int, n: int, rank: int) -> int:
    """Most bytes of taking all singular values: tiles, the Gram matrix and LAPACK's workspace, factors, and of a wide
    matrix itself in float64, with its two sides."""
    short = min(m, n)
    wide = 3 * m * n if m < n else 0
    return 8 * (4 * TILE_ELEMENTS + wide + 6 * short * short + 3 * (m + n) * min(rank, short))


class Formed:
    """A matrix (m, n) whose rows are formed, in float32, in each product anew: `operators.Operator`."""

    def __init__(self, form: Form, m: int, n: int, run: Run) -> None:
        self.shape = m, n
        self._form, self._run = form, run
        self._bands = _bands(m, n)
        self._square: float | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """A @ x: (n, l) -> (m, l)."""
        out = torch.empty(self.shape[0], x.shape[1])

        def task(i: int) -> None:
            torch.mm(self._form(self._bands[i]), x, out=out[self._bands[i]])

        self._run(task, len(self._bands))
        return out

    def rmatmul(self, y: Tensor) -> Tensor:
        """A.T @ y: (m, l) -> (n, l)."""
        chunks = [self._bands[first::BANDS] for first in range(min(BANDS, len(self._bands)))]
        sums = torch.zeros(len(chunks), y.shape[1], self.shape[1])

        def task(i: int) -> None:
            for band in chunks[i]:
                sums[i].addmm_(y[band].T, self._form(band))

        self._run(task, len(chunks))
        return sums.sum(0).T

    def squared_norm(self) -> float:
        """|A|_F^2, taken once."""
        if self._square is None:
            parts = [0.0] * len(self._bands)

            def task(i: int) -> None:
                parts[i] = sum_of_squares(self._form(self._bands[i]))

            self._run(task, len(parts))
            self._square = math.fsum(parts)
        return self._square


def along(found: Leading, k: int, op: Operator) -> tuple[float, float]:
    """Of a matrix A and the k leading directions of another, B: |U U' A|_F / |A|_F, and <A, B_k> / |B_k|_F^2.

    The second is 1 where A holds the whole of B_k, 0 where it holds none of it, and negative where it is reversed.
    Raises NotFinite.
    """
    images = op.rmatmul(found.u[:, :k].contiguous()).double()
    whole = math.sqrt(op.squared_norm()) if op.squared_norm() >= 0 else math.nan
    part = float(torch.linalg.vector_norm(images))
    if not (math.isfinite(whole) and math.isfinite(part)):
        raise NotFinite("the fine-tuned model, or its difference from base, holds NaN or Inf")
    s = found.s[:k]
    kept = float(((images * found.vh[:k].T.double()).sum(0) * s).sum() / s.square().sum())
    return (min(1.0, part / whole) if whole > 0 else 0.0), kept


def norm_of_rows(form: Form, m: int, n: int, run: Run) -> float:
    """|A|_F of a matrix (m, n), in one pass."""
    return math.sqrt(Formed(form, m, n, run).squared_norm())


@dataclass(frozen=True, slots=True)
class Updates:
    """The updates whose rounding is measured: (u * s * factor(k, alpha)) @ vh for each rank k and alpha."""

    start: Tensor  # (m, n): what they are added to
    u: Tensor  # (m, r)
    s: Tensor  # (r,)
    vh: Tensor  # (r, n)
    ranks: Sequence[int]
    alphas: Sequence[float]
    merged: bool = False  # delta itself is part of the update: an adapter's, of which W1 was never rounded


def cells_of(
    updates: Updates, dtype: torch.dtype, key: tuple[int, int], first: int, run: Run
) -> tuple[tuple[Cell, ...], int]:
    """What rounding to `dtype` leaves of each, by the arithmetic and random words of a run; and of how many elements.

    `key` and `first` are as in `kernels.lowrank_update`.
    """
    m, n = updates.start.shape
    wide = torch.float64 if torch.float64 in (updates.start.dtype, dtype) else torch.float32
    vh = updates.vh.to(wide)
    bands = _looked_at(m, n)
    asked: list[tuple[int, float, Rounding]] = [
        (rank, alpha, rounding) for rank in updates.ranks for alpha in updates.alphas for rounding in ROUNDINGS
    ]
    sums = [[(0.0, 0.0)] * len(asked) for _ in bands]

    def task(i: int) -> None:
        band = bands[i]
        out = torch.empty(band.stop - band.start, n, dtype=dtype)
        for number, (rank, alpha, rounding) in enumerate(asked):
            us, k = _scaled(updates, rank, alpha, band)
            kept = lowrank_update(
                updates.start[band],
                us.to(wide),
                vh[:k],
                out,
                key=key if rounding == "stochastic" else None,
                first=first + band.start * n,
            )
            sums[i][number] = kept.dot, kept.square

    run(task, len(bands))
    cells = tuple(
        Cell(*of, math.fsum(one[number][0] for one in sums), math.fsum(one[number][1] for one in sums))
        for number, of in enumerate(asked)
    )
    return cells, sum(band.stop - band.start for band in bands) * n


def _scaled(updates: Updates, rank: int, alpha: float, band: slice) -> tuple[Tensor, int]:
    """U times its factors, of some rows, and how many columns that has."""
    most = len(updates.s)
    k = min(rank, most)
    factor = updates.s[:k] * alpha
    if updates.merged:
        factor = updates.s.clone()
        factor[:k] *= 1 + alpha
        k = most
    return updates.u[band, :k].double() * factor, k


def _looked_at(m: int, n: int) -> list[slice]:
    """Bands of whole rows, at even distances, or all of them; none of more than a tile's elements."""
    if m * n <= LOOKED_AT:
        return _bands(m, n)
    most = max(1, TILE_ELEMENTS // n)
    count = min(BANDS, m, max(1, LOOKED_AT // n))
    rows = max(1, min(most, LOOKED_AT // n // count))
    return [slice(top, top + rows) for top in (i * (m - rows) // max(1, count - 1) for i in range(count))]
