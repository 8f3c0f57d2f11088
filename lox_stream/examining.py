"""What is found of the matrices of one tensor: in base, in aligned, and in a model that was fine-tuned from aligned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_stream import fp8
from lox_stream.analysed import Cell, Finding, Robustness
from lox_stream.costs import solver_bytes
from lox_stream.delta import NotFinite
from lox_stream.kernels import key_of
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step, rescaled
from lox_stream.measuring import (
    WHOLE_SIDE,
    Form,
    Formed,
    Leading,
    Updates,
    along,
    cells_of,
    leading,
    leading_of,
    norm_of_rows,
    of_change,
    whole_bytes,
)
from lox_stream.merging import change_of, factors_at, read_sides
from lox_stream.names import matches, printable
from lox_stream.options import Options
from lox_stream.outcomes import accepted, setting_of
from lox_stream.reader import TORCH_DTYPES, matrix_of
from lox_stream.regions import Region, parts_of_each, regions_of
from lox_stream.spectra import Spectrum, bulk_of, entropy_rank

REFERENCE_RANK = 100  # of the robustness metrics in the paper's code
NOT_LINEAR = ("*embed*", "*wte.weight", "*wpe.weight", "*shared.weight", "*norm*")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured of each matrix."""

    options: Options
    values: int  # leading singular values
    ranks: tuple[int, ...]  # of the updates whose rounding is measured
    alphas: tuple[float, ...]
    reference: bool  # also the robustness metrics as the paper's code has them

    @property
    def rank(self) -> int:
        """How many directions are taken."""
        return max(self.values, *self.ranks)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix (m, n) of a tensor, in all models."""

    step: Step
    region: Region
    w0: Tensor
    w1: Tensor | None  # None where an adapter is what makes it of w0
    aligned: Form  # some rows of W1, as they are stored or, of an adapter, in float32
    finetuned: Form | None


def examined(step: Step, later: Step | None, asked: Asked, run: Run) -> list[Finding]:
    """Each matrix of a tensor that a run would extrapolate; `later` says where a fine-tuned model has it.

    Raises DataError for NaN or Inf, unless `on_nonfinite` is "copy".
    """
    found = []
    with contextlib.ExitStack() as maps:
        matrix_at = _opened(step, later, maps, run)
        for region in regions_of(step):
            try:
                found.append(_finding(matrix_at(region), asked, run))
            except NotFinite as problem:
                at = printable(step.name + region.label)
                notice = f"{at}: not looked at: {accepted(step, problem, asked.options)}"
                found.append(_nothing(step, region, 0.0, (notice,)))
    return found


def examining_bytes(step: Step, asked: Asked) -> int:
    """Most bytes that looking at a tensor takes beside what such a step takes in a run."""
    if step.action != "extrapolate":
        return 0
    return max(_bytes_for(part.m, part.n, asked.rank) for part in parts_of_each(step))


def _bytes_for(m: int, n: int, rank: int) -> int:
    if min(m, n) <= WHOLE_SIDE:
        return whole_bytes(m, n, max(rank, REFERENCE_RANK))
    return solver_bytes(m, n, max(rank, REFERENCE_RANK))


def _opened(step: Step, later: Step | None, maps: contextlib.ExitStack, run: Run) -> Callable[[Region], _Matrix]:
    """Makes the matrices of a tensor, over maps that are left open in `maps`."""
    aligned = fp8.elements(step.aligned, step.scaled, maps, run)
    base = aligned if step.base is None else fp8.elements(step.base, step.base_scaled, maps, run)
    tuned = None
    if later is not None and later.factors is None:
        tuned = fp8.elements(later.aligned, later.scaled, maps, run)

    def matrix(region: Region) -> _Matrix:
        w0, w1 = matrix_of(base, region), matrix_of(aligned, region)
        rows = _rows(w1, step, region)
        if later is None:
            finetuned = None
        elif tuned is None:
            finetuned = _rows(w1, later, region)
        else:
            finetuned = _rows(matrix_of(tuned, region), later, region)
        return _Matrix(step, region, w0, None if step.factors else w1, rows, finetuned)

    return matrix


def _rows(w: Tensor, step: Step, region: Region) -> Form:
    """Some rows of a weight, and of what an adapter adds to them."""
    if step.factors is None:
        return lambda band: w[band]
    left, right = (side.float() for side in read_sides(factors_at(step, region)))
    left = left * step.factors.scaling
    return lambda band: torch.addmm(w[band].float(), left[band], right)


def _finding(matrix: _Matrix, asked: Asked, run: Run) -> Finding:
    step, region, w0 = matrix.step, matrix.region, matrix.w0
    setting = setting_of(step, asked.options, region)
    weight_norm = norm_of_rows(lambda band: matrix.aligned(band).float(), region.m, region.n, run)
    if matrix.w1 is None:
        found = of_change(change_of(factors_at(step, region)))
    else:
        found = leading(matrix.w1, w0, asked.rank, setting.seed, run)
    if found is None:
        return _nothing(step, region, weight_norm)
    cells, looked_at = _retained(matrix, found, asked, setting.first, run)
    norm, few = math.sqrt(found.square), found.values[: asked.values]
    every = Spectrum(region.m, region.n, found.values, norm, found.whole)
    return Finding(
        step.name,
        region.label,
        region.m,
        region.n,
        step.dtype or step.aligned.dtype,
        norm,
        weight_norm,
        spectrum=Spectrum(region.m, region.n, few, norm, found.whole and len(few) == len(found.values)),
        radius=found.radius[: asked.values],
        entropy_rank=entropy_rank(every),
        bulk=bulk_of(every),
        cells=cells,
        looked_at=looked_at,
        ours=_ours(matrix, found, run),
        reference=_reference(matrix, setting.seed, run) if asked.reference and is_linear(step) else None,
    )


def _nothing(step: Step, region: Region, weight_norm: float, notices: tuple[str, ...] = ()) -> Finding:
    """Of a matrix without a difference, or one that was not looked at."""
    return Finding(
        step.name, region.label, region.m, region.n, step.dtype or step.aligned.dtype, 0.0, weight_norm, notices=notices
    )


def _retained(matrix: _Matrix, found: Leading, asked: Asked, first: int, run: Run) -> tuple[tuple[Cell, ...], int]:
    """What rounding leaves of the updates of the grid; nothing of FP8, whose scales are made anew with each."""
    step = matrix.step
    if rescaled(step):
        return (), 0
    start = matrix.w0 if matrix.w1 is None else matrix.w1
    dtype = TORCH_DTYPES[step.dtype] if step.dtype else start.dtype
    updates = Updates(start, found.u, found.s, found.vh, asked.ranks, asked.alphas, merged=matrix.w1 is None)
    return cells_of(updates, dtype, key_of(asked.options.seed, step.seed_name or step.name), first, run)


def _ours(matrix: _Matrix, found: Leading, run: Run) -> Robustness:
    """In float32, at the rank of a run."""
    rank, finetuned = matrix.step.rank or len(found.s), matrix.finetuned
    if finetuned is None:
        return _robustness(found, rank)
    total = Formed(
        lambda band: finetuned(band).float() - matrix.w0[band].float(), matrix.region.m, matrix.region.n, run
    )
    return _robustness(found, rank, total)


def _robustness(found: Leading, rank: int, total: Formed | None = None) -> Robustness:
    """By the leading directions of the alignment; `total` is the difference of the fine-tuned model from base."""
    k = min(rank, len(found.s))
    align = math.sqrt(min(1.0, float(found.s[:k].square().sum()) / found.square))
    return Robustness(k, align) if total is None else Robustness(k, align, *along(found, k, total))


def _reference(matrix: _Matrix, seed: int, run: Run) -> Robustness | None:
    """As the paper's code: differences of bfloat16 weights in bfloat16, and the sum of the two, at rank 100."""
    m, n = matrix.region.m, matrix.region.n

    def delta(band: slice) -> Tensor:
        return matrix.aligned(band).bfloat16() - matrix.w0[band].bfloat16()

    found = leading_of(lambda band: delta(band).float(), m, n, REFERENCE_RANK, seed, run)
    if found is None or not math.isfinite(found.square):  # bfloat16 may not hold it
        return None
    finetuned = matrix.finetuned
    if finetuned is None:
        return _robustness(found, REFERENCE_RANK)

    def total(band: slice) -> Tensor:
        return (delta(band) + (finetuned(band).bfloat16() - matrix.aligned(band).bfloat16())).float()

    return _robustness(found, REFERENCE_RANK, Formed(total, m, n, run))


def is_linear(step: Step) -> bool:
    """Whether it is, by its name and shape, the weight of an `nn.Linear`, of which alone the paper's code speaks."""
    plain = step.count == 1 and not step.parts and len(step.aligned.shape) == 2
    return plain and step.name.endswith(".weight") and not matches(step.name, NOT_LINEAR)
