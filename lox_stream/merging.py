"""Matrices of a base that an adapter changes by two thin factors: base to extrapolated in one update, rounded once.

With delta = scaling * B A = U diag(S) Vh, which two thin QR factorisations and the SVD of a small matrix give in
float64, W0 + delta + alpha * Proj_k(delta) is W0 + U diag(S * c) Vh, where c is 1 + alpha for the first k and 1 for the
others: one low-rank update of W0, with no pass over it before. W1 = W0 + delta itself is never rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_stream.adapters import Factors
from lox_stream.convergence import UNITS
from lox_stream.delta import NotFinite
from lox_stream.direct import NO_GAP
from lox_stream.facts import MatrixFacts
from lox_stream.kernels import lowrank_update
from lox_stream.kernels.cpu import Retained, Run
from lox_stream.matching import Step
from lox_stream.names import printable
from lox_stream.reader import mapped, read_floats
from lox_stream.regions import Region
from lox_stream.samples import Sample, places
from lox_stream.update import ROUNDED, Matrix, Tiles, emit_tiles, lowrank_block

FLOAT64_EPS = torch.finfo(torch.float64).eps
NO_SUM = "base holds NaN or Inf, or the sum is beyond its range"  # who asks looks at base


@dataclass(frozen=True, slots=True)
class Change:
    """U diag(S) Vh of a delta (m, n): all of it, in float64; S in falling order."""

    u: Tensor  # (m, r)
    s: Tensor  # (r,)
    vh: Tensor  # (r, n)


def read_sides(factors: Factors) -> tuple[Tensor, Tensor]:
    """The (m, r) and (r, n) matrices whose product, times the scaling, is delta; float64."""
    again = factors.count > 1  # by the next matrix of the stack, whose columns lie on the same pages
    with mapped(factors.a, again=again) as a, mapped(factors.b, again=again) as b:
        left, right = sides_of(read_floats(b, factors.b), read_floats(a, factors.a), factors.count, factors.number)
        left, right = left.double(), right.double()
    left, right = (right.T, left.T) if factors.turned else (left, right)
    return (left if factors.rows is None else left[slice(*factors.rows)]), right


def sides_of(b: Tensor, a: Tensor, count: int, number: int) -> tuple[Tensor, Tensor]:
    """B and A of one matrix of a stack, (out, r) and (r, in), where `stacked` says that they lie in those of all."""
    return b.view(b.shape[0], -1, count)[:, :, number], a.view(count, a.shape[0] // count, -1)[number]


def factors_at(step: Step, region: Region) -> Factors:
    """Those of one matrix of a step."""
    assert step.factors is not None, "planning gave it some"
    return replace(step.factors, number=step.factors.number + region.index)


def change_of(factors: Factors) -> Change:
    """The singular value decomposition of delta. Raises NotFinite for factors that hold NaN or Inf.

    Costs some 6 (m + n) r^2 operations in float64, and no pass over a weight.
    """
    left, right = read_sides(factors)
    for name, side in ((factors.b.name, left), (factors.a.name, right)):
        if not bool(side.isfinite().all()):
            raise NotFinite(f"the adapter's {printable(name)} holds NaN or Inf")
    q, inner = torch.linalg.qr(left)
    p, outer = torch.linalg.qr(right.T)
    core = factors.scaling * inner @ outer.T
    if not bool(core.isfinite().all()):
        raise NotFinite("the adapter's change is beyond float64")
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return Change(q @ u, s, vh @ p.T)


def update_by(factors: Factors, matrix: Matrix, run: Run) -> MatrixFacts | NotFinite:
    """W0 + delta + alpha * Proj_k(delta) into the matrix's one outlet, k being the setting's rank.

    The matrix has W0 for both of its weights. If delta is zero nothing is emitted (`method="zero"`).
    """
    change = change_of(factors)
    w0, setting, (outlet,) = matrix.w0, matrix.setting, matrix.outlets
    k = min(setting.rank, len(change.s)) if setting.rank else len(change.s)
    sample = _sample(change, w0, matrix.dtype)
    weight_norm = sample.weight_norm * math.sqrt(w0.numel() / len(places(w0.numel())))
    if not float(change.s[0]) > 0:
        return MatrixFacts(0.0, weight_norm, 0.0, None, "zero")
    factor = torch.ones_like(change.s)
    factor[:k] += outlet.alpha
    added = change.s * factor
    wide = torch.float64 if torch.float64 in (w0.dtype, matrix.dtype) else torch.float32
    us, vh = (change.u * added).to(wide), change.vh.to(wide)

    def block(band: slice, part: slice, out: Tensor, first: int) -> Retained:
        return lowrank_update(w0[band, part], us[band], vh[:, part], out, key=setting.key, first=first)

    (kept,) = emit_tiles([Tiles(matrix, outlet.emit, block)], run)
    if not kept.finite:
        return NotFinite(NO_SUM)
    return _facts(change.s, k, float(added.norm()), weight_norm, sample, kept, matrix)


def merged_by(factors: Factors, matrix: Matrix, run: Run) -> MatrixFacts | NotFinite:
    """W0 + delta into the matrix's one outlet: (scaling B) A as the factors are, by the arithmetic of `run`.

    So a merged adapter of lox-stream's own, in float32, is what `run` writes, bit by bit. If delta is zero nothing is
    emitted (`method="zero"`).
    """
    w0, (outlet,) = matrix.w0, matrix.outlets
    change = change_of(factors)
    sample = _sample(change, w0, matrix.dtype)
    weight_norm = sample.weight_norm * math.sqrt(w0.numel() / len(places(w0.numel())))
    norm = float(change.s.norm())
    if not norm > 0:
        return MatrixFacts(0.0, weight_norm, 0.0, None, "zero")
    wide = torch.float64 if torch.float64 in (w0.dtype, matrix.dtype) else torch.float32
    left, right = without_zeros(*read_sides(factors))
    block = lowrank_block(matrix, left.to(wide), right.to(wide), factors.scaling)
    (kept,) = emit_tiles([Tiles(matrix, outlet.emit, block)], run)
    if not kept.finite:
        return NotFinite(NO_SUM)
    return MatrixFacts(norm, weight_norm, norm, kept.retention, "merged", tuple(change.s.tolist()))


def without_zeros(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, r) and (r, n) without the columns and rows at their end that are padding."""
    used = (left != 0).any(0) | (right != 0).any(1)
    count = int(used.nonzero()[-1]) + 1 if bool(used.any()) else 0
    return left[:, :count].contiguous(), right[:count].contiguous()


def _facts(
    s: Tensor, k: int, update_norm: float, weight_norm: float, sample: Sample, kept: Retained, matrix: Matrix
) -> MatrixFacts:
    first, last, side = float(s[0]), float(s[k - 1]), math.sqrt(matrix.w0.numel())
    after = float(s[k]) if k < len(s) else 0.0
    radius = UNITS * FLOAT64_EPS * first
    gap = (last - after) / last if last > 0 else 0.0
    part, whole = float(s[:k].norm()), float(s.norm())
    error = radius * math.sqrt(k) / max(gap, NO_GAP) if k < len(s) else radius
    share = sample.share(error / side, update_norm / side)
    return MatrixFacts(
        delta_norm=whole,
        weight_norm=weight_norm,
        update_norm=update_norm,
        retention=kept.retention,
        method="factors",
        singular_values=tuple(s[:k].tolist()),
        radius=(radius,) * k,
        energy=(part / whole) ** 2,
        residual=radius / first,
        gap=gap,
        unique=k == len(s) or gap > NO_GAP,
        predicted_error=error / part,
        predicted_share=share if matrix.dtype in ROUNDED else None,
    )


def _sample(change: Change, w0: Tensor, dtype: torch.dtype) -> Sample:
    """Of W1 = W0 + delta, rounded, at the places where other matrices are looked at."""
    at = places(w0.numel())
    rows, columns = at // w0.shape[1], at % w0.shape[1]
    some = w0.reshape(-1)[at]
    delta = ((change.u[rows] * change.s) * change.vh.T[columns]).sum(1)
    return Sample(some.double() + delta, some, dtype)
