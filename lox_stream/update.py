"""One matrix from (W1, W0) to its extrapolated tiles and facts. Knows no file: tiles leave through `emit`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_stream.delta import Delta, NotFinite, first_not_finite, largest_entry, power_of_two
from lox_stream.facts import MatrixFacts
from lox_stream.kernels import fullrank_update, lowrank_update
from lox_stream.kernels.cpu import TILE_ELEMENTS, Retained, Run, scratch
from lox_stream.options import Options
from lox_stream.svd import TruncatedSVD, relative, truncated_svd

SAMPLE = 1 << 14
LOWEST_EXPONENT = 1100  # below those of all float64 numbers
MEAN_OF_NORMAL = math.sqrt(2 / math.pi)  # mean |x| / rms x
RELATIVE_CAP = 5e-4  # relative error of the rank-k part that 16-bit outputs may have, however coarse their grid: an
# element where W1 is near zero has a fine grid of its own, and six deviations of this are within one step of it
WIDE_TOLERANCE = 1e-5  # relative error of the rank-k part, for float32 and float64 outputs
FLOAT32_EPS = torch.finfo(torch.float32).eps

Emit = Callable[[int, Tensor], None]  # emit(index of the tile's first element in the matrix, tile)


class Sample:
    """Some elements of W1 and delta at fixed places: sizes, and how coarse the output's grid is where they lie."""

    def __init__(self, w1: Tensor, w0: Tensor) -> None:
        stride = max(1, w1.numel() // SAMPLE) | 1
        some = w1.reshape(-1)[::stride].double()
        delta = some - w0.reshape(-1)[::stride].double()
        self.delta_rms = float(delta.square().mean().sqrt())
        self.weight_norm = float(some.square().mean().sqrt()) * math.sqrt(w1.numel())
        finfo = torch.finfo(w1.dtype)
        self._eps, self._tiny = finfo.eps, finfo.tiny
        exponents = torch.where(some == 0, 0, torch.frexp(some)[1] + LOWEST_EXPONENT).clamp_(0)
        counts = torch.bincount(exponents).tolist()
        self._exponents: list[tuple[int, float]] = [
            (e - LOWEST_EXPONENT, count / some.numel()) for e, count in enumerate(counts) if count
        ]

    def share(self, error_rms: float, update_rms: float) -> float:
        """Predicted share of output elements that `error_rms` moves to another value.

        An error e flips an element with probability |e| / ulp, ulp being the spacing of the output's dtype at
        max(|W1|, update); e is taken as normal and independent of W1. The second term is what float32 arithmetic
        alone does, for a float64 oracle as well.
        """
        lowest = math.frexp(max(update_rms, self._tiny))[1]
        error = MEAN_OF_NORMAL * error_rms / self._eps
        flips: float = sum(part * min(1.0, error * 2.0 ** (1 - max(e, lowest))) for e, part in self._exponents)
        return flips + 0.5 * FLOAT32_EPS / self._eps


@dataclass(frozen=True, slots=True)
class Setting:
    """What the arithmetic of one matrix depends on, beside the weights."""

    options: Options
    rank: int
    seed: int  # of the solver's start block, from the tensor's name
    key: tuple[int, int] | None = None  # of stochastic rounding; None: to nearest
    first: int = 0  # index in the tensor of the matrix's first element


def extrapolate_matrix(w1: Tensor, w0: Tensor, setting: Setting, emit: Emit, run: Run) -> MatrixFacts:
    """W1 + alpha * Proj_k(W1 - W0) of two (m, n) weights, tile by tile into `emit`, in the dtype of W1.

    If delta is zero nothing is emitted (`method="zero"`): the output is W1. Raises NotFinite, before anything is
    emitted where the solver finds it, and after it where only the result overflows the dtype.
    """
    sample = Sample(w1, w0)
    if not sample.delta_rms > 0.0 and _identical(w1, w0, run):
        return MatrixFacts(0.0, sample.weight_norm, 0.0, None, "zero", converged=True)
    if setting.rank == 0 or setting.rank >= min(w1.shape):
        return _full_rank(w1, w0, sample, setting, emit, run)
    found, scale, method = _solve(w1, w0, sample, setting, run)
    if not len(found.s):
        return MatrixFacts(0.0, sample.weight_norm, 0.0, None, "zero", passes=found.passes)
    wide = torch.float64 if w1.dtype == torch.float64 else torch.float32
    us = (found.u.double() * (found.s.double() * (setting.options.alpha / scale))).to(wide)
    vh = found.vh.to(wide)

    def block(band: slice, part: slice, out: Tensor, first: int) -> Retained:
        return lowrank_update(w1[band, part], us[band], vh[:, part], out, key=setting.key, first=first)

    kept = _emit_tiles(w1, block, setting, emit, run)
    return _facts(found, scale, method, sample, setting, kept, w1)


def _solve(w1: Tensor, w0: Tensor, sample: Sample, setting: Setting, run: Run) -> tuple[TruncatedSVD, float, str]:
    """The rank-k part of delta * scale."""
    if setting.options.svd == "exact":
        scale = power_of_two(largest_entry(w1, w0, run))
        return exact_svd(w1, w0, setting.rank, scale), scale, "exact"
    op = Delta(w1, w0, run, rms=sample.delta_rms)
    alpha, size = abs(setting.options.alpha), math.sqrt(w1.numel())

    def enough(error: float, part: float) -> bool:
        if error > RELATIVE_CAP * part:
            return False
        per_element = alpha / op.scale / size
        return sample.share(error * per_element, part * per_element) <= setting.options.tolerance

    generator = torch.Generator().manual_seed(setting.seed)
    rounds = w1.dtype in (torch.bfloat16, torch.float16)
    found = truncated_svd(op, setting.rank, generator=generator, enough=enough if rounds else relative(WIDE_TOLERANCE))
    return found, op.scale, "krylov"


def exact_svd(w1: Tensor, w0: Tensor, rank: int, scale: float = 1.0) -> TruncatedSVD:
    """The rank-k part of (W1 - W0) * scale by LAPACK's full SVD in float64. `costs.exact_bytes` of memory."""
    delta = (w1.double() * scale).sub_(w0.double() * scale)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    after = float(s[rank]) if len(s) > rank else 0.0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    kept = s > 0
    u, s, vh = u[:, kept], s[kept], vh[kept]
    radius = torch.maximum(
        torch.linalg.vector_norm(delta @ vh.T - u * s, dim=0), torch.linalg.vector_norm(delta.T @ u - vh.T * s, dim=0)
    )
    last = float(s[-1]) if len(s) else 0.0
    gap = (last - after) / last if last else 1.0
    return TruncatedSVD(
        u=u,
        s=s,
        vh=vh,
        residual=float((radius / s[0]).max()) if len(s) else 0.0,
        radius=tuple(radius.tolist()),
        squared_norm=float(delta.square().sum()),
        gap=gap,
        error=torch.finfo(torch.float64).eps * float(torch.linalg.vector_norm(s)) / max(gap, 1e-12),
        passes=0,
        converged=True,
        unique=gap > 1e-12,
    )


def _full_rank(w1: Tensor, w0: Tensor, sample: Sample, setting: Setting, emit: Emit, run: Run) -> MatrixFacts:
    alpha = setting.options.alpha

    def block(band: slice, part: slice, out: Tensor, first: int) -> Retained:
        return fullrank_update(w1[band, part], w0[band, part], alpha, out, key=setting.key, first=first)

    kept = _emit_tiles(w1, block, setting, emit, run)
    if not kept.finite:
        raise NotFinite(first_not_finite(w1, w0))
    norm = math.sqrt(kept.square)
    return MatrixFacts(
        delta_norm=norm / abs(alpha),
        weight_norm=sample.weight_norm,
        update_norm=norm,
        retention=kept.retention,
        method="full rank",
        energy=1.0,
    )


def _emit_tiles(
    w1: Tensor,
    block: Callable[[slice, slice, Tensor, int], Retained],
    setting: Setting,
    emit: Emit,
    run: Run,
) -> Retained:
    """Compute the output in tiles of consecutive elements and hand each to `emit`; sums in tile order."""
    m, n = w1.shape
    columns = min(n, TILE_ELEMENTS)
    rows = max(1, TILE_ELEMENTS // columns)
    parts = -(-n // columns)
    kept: list[Retained] = [Retained(0.0, 0.0)] * (-(-m // rows) * parts)

    def task(i: int) -> None:
        top, left = (i // parts) * rows, (i % parts) * columns
        band, part = slice(top, min(top + rows, m)), slice(left, min(left + columns, n))
        shape = torch.Size((band.stop - band.start, part.stop - part.start))
        out = scratch(3, shape, w1.dtype)
        first = top * n + left
        kept[i] = block(band, part, out, setting.first + first)
        emit(first, out)

    run(task, len(kept))
    return Retained(sum(k.dot for k in kept), sum(k.square for k in kept), all(k.finite for k in kept))


def _identical(w1: Tensor, w0: Tensor, run: Run) -> bool:
    rows = max(1, TILE_ELEMENTS // w1.shape[1])
    count = -(-w1.shape[0] // rows)
    same = [True] * count

    def task(i: int) -> None:
        band = slice(i * rows, (i + 1) * rows)
        same[i] = bool(((w1[band] == w0[band]) | (w1[band].isnan() & w0[band].isnan())).all())

    run(task, count)
    return all(same)


def _facts(
    found: TruncatedSVD, scale: float, method: str, sample: Sample, setting: Setting, kept: Retained, w1: Tensor
) -> MatrixFacts:
    if not kept.finite:
        raise NotFinite(f"the extrapolated weight is beyond the range of {str(w1.dtype).removeprefix('torch.')}")
    alpha = setting.options.alpha
    values = [float(s) / scale for s in found.s]
    squares = float(found.s.double().square().sum())
    part = math.sqrt(squares) / scale
    rounds = w1.dtype in (torch.bfloat16, torch.float16)
    size = math.sqrt(w1.numel())
    error = found.error / scale
    return MatrixFacts(
        delta_norm=math.sqrt(found.squared_norm) / scale,
        weight_norm=sample.weight_norm,
        update_norm=abs(alpha) * part,
        retention=kept.retention,
        method=method,
        singular_values=tuple(values),
        radius=tuple(r / scale for r in found.radius),
        energy=min(1.0, squares / found.squared_norm),
        residual=found.residual,
        passes=found.passes,
        gap=found.gap,
        unique=found.unique,
        predicted_error=error / part,
        predicted_share=sample.share(abs(alpha) * error / size, abs(alpha) * part / size) if rounds else None,
        converged=found.converged,
    )
