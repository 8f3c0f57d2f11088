"""Matrices from (W1, W0) to their extrapolated tiles and facts. Knows no file: tiles leave through `emit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_stream.costs import by_gram, kept
from lox_stream.delta import Delta, KeptDelta, NotFinite, OutOfRange, first_not_finite, largest_entry, operator
from lox_stream.direct import exact_svd, gram_svd
from lox_stream.facts import MatrixFacts
from lox_stream.kernels import GPUKernels, fullrank_update, lowrank_update
from lox_stream.kernels.cpu import TILE_ELEMENTS, Retained, Run, scratch
from lox_stream.operators import FLOAT32_SCALE, FLOAT64_SCALE, power_of_two, upload
from lox_stream.options import Options, alpha_solved_for
from lox_stream.samples import Sample, norm_of
from lox_stream.svd import TruncatedSVD, transposed, truncated_svds

OUT_SLOT, KEPT_SLOT = 3, 4  # of a thread's scratch memory; the kernels have those before
VECTOR = 16  # float32 numbers that a core loads at once, at most
RELATIVE_CAP = 5e-4  # relative error of the rank-k part that 16-bit outputs may have, however coarse their grid: an
# element where W1 is near zero has a fine grid of its own, and six deviations of this are within one step of it
WIDE_TOLERANCE = 1e-5  # relative error of the rank-k part, for float32 and float64 outputs
ROUNDED = (torch.bfloat16, torch.float16)  # outputs whose elements are compared one by one

Emit = Callable[[int, Tensor], None]  # emit(index of the tile's first element in the matrix, tile)
Take = Callable[[Tensor, Tensor], None]  # take(B (m, r), A (r, n)): the rank-k part of delta is B A
Block = Callable[[slice, slice, Tensor, int], Retained]  # block(rows, columns, out, index in the tensor of the first)
Outcome = MatrixFacts | NotFinite
Outcomes = tuple[Outcome, ...]  # of a matrix: one for each of its outlets


@dataclass(frozen=True, slots=True)
class Setting:
    """What the arithmetic of one matrix depends on, beside the weights."""

    options: Options
    rank: int
    seed: int  # of the solver's start block, from the tensor's name
    key: tuple[int, int] | None = None  # of stochastic rounding; None: to nearest
    first: int = 0  # number of the matrix's first element among the random words of its tensor


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where one result of a matrix goes: tiles of W1 + alpha * B A into `emit`, or B and A themselves into `take`."""

    alpha: float
    emit: Emit = lambda first, tile: None
    take: Take | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix to extrapolate: its weights (m, n), how, and where its results go."""

    w1: Tensor
    w0: Tensor
    setting: Setting
    outlets: tuple[Outlet, ...]
    tell: Callable[[str], None] = lambda notice: None  # a person, of something that went otherwise than planned
    rounded_to: torch.dtype | None = None  # what the tiles are; None: the dtype of W1
    judged_as: torch.dtype | None = None  # the grid that the accuracy is for; None: that of the tiles

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles."""
        return self.w1.dtype if self.rounded_to is None else self.rounded_to

    @property
    def grid(self) -> torch.dtype:
        """That decides how accurate the rank-k part has to be."""
        return self.dtype if self.judged_as is None else self.judged_as


def extrapolate_matrix(w1: Tensor, w0: Tensor, setting: Setting, emit: Emit, run: Run) -> MatrixFacts:
    """W1 + alpha * Proj_k(W1 - W0) of two (m, n) weights, tile by tile into `emit`, in the dtype of W1.

    If delta is zero nothing is emitted (`method="zero"`): the output is W1. Raises NotFinite, before anything is
    emitted where the solver finds it, and after it where only the result overflows the dtype.
    """
    ((outcome,),) = extrapolate_matrices([Matrix(w1, w0, setting, (Outlet(setting.options.alpha, emit),))], run)
    if isinstance(outcome, NotFinite):
        raise outcome
    return outcome


def extrapolate_matrices(matrices: Sequence[Matrix], run: Run) -> list[Outcomes]:
    """`extrapolate_matrix` of several of one shape and rank, solved together; each has the bits that it has alone.

    Of each the facts, or what is not finite, for all of its outlets.
    """
    ready = solve_matrices(matrices, run)
    finished = iter(_finish([one for one in ready if isinstance(one, Solved)], run))
    return [next(finished) if isinstance(one, Solved) else one for one in ready]


def _rooms(matrices: Sequence[Matrix]) -> Sequence[Tensor | None]:
    """Where small differences are kept: this thread's own memory, used again for the next ones.

    Fresh memory of some megabytes, in turn with small pieces that last, left holes that no other tensor fitted: a run
    of 160 layers of small matrices held 500 MiB at its end, of 80 layers 400; now 340 in both. Each begins at a whole
    vector: the last bits of a product depend on that, and must not on the matrices beside it.
    """
    shape = matrices[0].w1.shape
    if not kept(*shape):
        return [None] * len(matrices)
    length = -(-shape.numel() // VECTOR) * VECTOR
    memory = scratch(KEPT_SLOT, torch.Size((len(matrices), length)), torch.float32)
    return [one[: shape.numel()].view(shape) for one in memory]


def solve_matrices(matrices: Sequence[Matrix], run: Run) -> list[Outcomes | Solved]:
    """The first half: the factors of each, or the facts of those that have none and are done."""
    begun = [_begin(matrix, run, room) for matrix, room in zip(matrices, _rooms(matrices), strict=True)]
    try:
        solved = iter(_solve([one for one in begun if isinstance(one, _Unsolved)]))
    except NotFinite as problem:
        if len(matrices) > 1:
            return [solve_matrices([matrix], run)[0] for matrix in matrices]
        return [alike(matrices[0], problem)]
    return [next(solved) if isinstance(one, _Unsolved) else one for one in begun]


def begin_away(matrix: Matrix, run: Run) -> Outcomes | Sample:
    """Of a matrix that is to be solved on a GPU: its facts where delta is zero, else what the solver has to know."""
    sample = Sample(matrix.w1, matrix.w0, matrix.grid)
    identical = not sample.delta_rms > 0.0 and _identical(matrix.w1, matrix.w0, run)
    return alike(matrix, _zero(sample)) if identical else sample


def solve_away(matrix: Matrix, sample: Sample, op: Delta) -> Outcomes | Solved:
    """`solve_matrices` of one whose products are taken on a GPU, by the randomized solver."""
    try:
        (solved,) = _solve([_Unsolved(matrix, sample, op)])
    except NotFinite as problem:
        return alike(matrix, problem.with_traceback(None))  # which would keep the copies
    return solved if len(solved.found.s) else alike(matrix, _zero(sample, solved.found.passes))


def alike(matrix: Matrix, outcome: Outcome) -> Outcomes:
    """What is the same for all outlets of a matrix."""
    return (outcome,) * len(matrix.outlets)


@dataclass(frozen=True, slots=True)
class _Unsolved:
    matrix: Matrix
    sample: Sample
    op: Delta | KeptDelta

    def enough(self, error: float, part: float) -> bool:
        return _enough(self.matrix, self.sample, self.op.scale, error, part)


def _enough(matrix: Matrix, sample: Sample, scale: float, error: float, part: float) -> bool:
    """Whether the output would be within the tolerance, with such norms of the error and of the rank-k part."""
    if matrix.grid not in ROUNDED:
        return error <= WIDE_TOLERANCE * part
    if error > RELATIVE_CAP * part:
        return False
    options = matrix.setting.options
    return _share(matrix, sample, scale, error, part, alpha_solved_for(options)) <= options.tolerance


def _share(matrix: Matrix, sample: Sample, scale: float, error: float, part: float, alpha: float) -> float:
    """Predicted share of output elements that differ, from norms of delta * scale's rank-k part and its error."""
    per_element = abs(alpha) / scale / math.sqrt(matrix.w1.numel())
    return sample.share(error * per_element, part * per_element)


@dataclass(frozen=True, slots=True)
class Solved:
    """The rank-k part of a matrix's delta, as far as it was asked for."""

    matrix: Matrix
    sample: Sample
    found: TruncatedSVD
    scale: float  # of found: the rank-k part is that of delta * scale
    method: str

    @property
    def part(self) -> float:
        """Its Frobenius norm, of delta * scale."""
        return math.sqrt(float(self.found.s.double().square().sum()))

    def predicted_share(self, alpha: float) -> float | None:
        """Of output elements that differ from the exact result; None for wide outputs."""
        if self.matrix.grid not in ROUNDED:
            return None
        return _share(self.matrix, self.sample, self.scale, self.found.error, self.part, alpha)


def _begin(matrix: Matrix, run: Run, room: Tensor | None) -> Outcomes | Solved | _Unsolved:
    """What is done at once, or the operator to solve."""
    w1, w0, setting = matrix.w1, matrix.w0, matrix.setting
    sample = Sample(w1, w0, matrix.grid)
    try:
        if not sample.delta_rms > 0.0 and _identical(w1, w0, run):
            return alike(matrix, _zero(sample))
        if setting.rank == 0 or setting.rank >= min(w1.shape):
            return _full_rank(matrix, sample, run)
        if setting.options.svd == "exact":
            return _exactly(matrix, sample, power_of_two(largest_entry(w1, w0, run), FLOAT64_SCALE))
        if by_gram(*w1.shape):
            return _by_gram(matrix, sample, KeptDelta(w1, w0, run, rms=sample.delta_rms, room=room))
        return _Unsolved(matrix, sample, operator(w1, w0, run, rms=sample.delta_rms, room=room))
    except NotFinite as problem:
        return alike(matrix, problem)


def _exactly(matrix: Matrix, sample: Sample, scale: float) -> Solved:
    """By LAPACK's full SVD in float64."""
    found = exact_svd(_wide_delta(matrix, scale), matrix.setting.rank)
    return _judged(Solved(matrix, sample, found, scale, "exact"))


def _by_gram(matrix: Matrix, sample: Sample, delta: KeptDelta) -> Solved:
    """By the Gram matrix: in float32 where that leaves a 16-bit output within the tolerance, else in float64."""
    rank, scale = matrix.setting.rank, delta.scale
    if matrix.grid in ROUNDED:
        quick = _judged(Solved(matrix, sample, gram_svd(delta.dense, rank), scale, "gram"))
        if quick.found.converged and quick.found.unique:
            return quick
    return _judged(Solved(matrix, sample, gram_svd(_wide_delta(matrix, scale), rank), scale, "gram"))


def _wide_delta(matrix: Matrix, scale: float) -> Tensor:
    """(W1 - W0) * scale in float64."""
    return (matrix.w1.double() * scale).sub_(matrix.w0.double() * scale)


def _judged(one: Solved) -> Solved:
    """With `converged` as the tolerance has it."""
    enough = _enough(one.matrix, one.sample, one.scale, one.found.error, one.part)
    return replace(one, found=replace(one.found, converged=enough or not one.found.unique))


def _solve(unsolved: Sequence[_Unsolved]) -> list[Solved]:
    if not unsolved:
        return []
    found = truncated_svds(
        [one.op for one in unsolved],
        unsolved[0].matrix.setting.rank,
        generators=[torch.Generator().manual_seed(one.matrix.setting.seed) for one in unsolved],
        enough=[one.enough for one in unsolved],
    )
    return [
        Solved(one.matrix, one.sample, transposed(svd) if one.op.turned else svd, one.op.scale, "krylov")
        for one, svd in zip(unsolved, found, strict=True)
    ]


def _finish(solved: Sequence[Solved], run: Run) -> list[Outcomes]:
    """Emit the updates of those that have one."""
    tiles: list[Tiles] = []
    for one in solved:
        if not len(one.found.s):
            continue
        b, a = factors_of(one, torch.float64 if one.matrix.w1.dtype == torch.float64 else torch.float32)
        for outlet in one.matrix.outlets:
            if outlet.take is None:
                block = lowrank_block(one.matrix, b, a, outlet.alpha)
                tiles.append(Tiles(one.matrix, outlet.emit, block))
            else:
                outlet.take(b, a)
    kept = iter(emit_tiles(tiles, run))
    return [
        tuple(facts_of(one, outlet, None if outlet.take else next(kept)) for outlet in one.matrix.outlets)
        if len(one.found.s)
        else alike(one.matrix, _zero(one.sample, one.found.passes))
        for one in solved
    ]


def _zero(sample: Sample, passes: int = 0) -> MatrixFacts:
    """Of a delta that is zero, or rounding and no more."""
    return MatrixFacts(0.0, sample.weight_norm, 0.0, None, "zero", passes=passes)


def lowrank_block(matrix: Matrix, b: Tensor, a: Tensor, alpha: float) -> Block:
    """Computes a block of W1 + (alpha B) A: the factors are the same, whoever stored them in between."""
    w1, setting, us = matrix.w1, matrix.setting, times(b, alpha)

    def block(band: slice, part: slice, out: Tensor, first: int) -> Retained:
        return lowrank_update(w1[band, part], us[band], a[:, part], out, key=setting.key, first=first)

    return block


def factors_of(one: Solved, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B = U sqrt(S) (m, r) and A = sqrt(S) Vh (r, n), where U and Vh lie: B A is the rank-k part of delta."""
    found = one.found
    root = upload((found.s.double() / one.scale).sqrt(), found.u.device)
    return (found.u.double() * root).to(dtype), (root[:, None] * found.vh.double()).to(dtype)


def times(b: Tensor, alpha: float) -> Tensor:
    """alpha * B, rounded once."""
    return (b.double() * alpha).to(b.dtype)


class UpdateAway:
    """W1 + (alpha B) A of a matrix on a GPU, some rows at a time, in place of W1.

    `sums` (3,) float64 on the GPU add up what `GPUKernels.lowrank_update` tells of the rows.
    """

    def __init__(self, one: Solved, b: Tensor, a: Tensor, outlet: Outlet, kernels: GPUKernels) -> None:
        self._us, self._vh = times(b, outlet.alpha).contiguous(), a.contiguous()
        self._one, self._outlet, self._kernels = one, outlet, kernels
        self.sums = torch.zeros(3, dtype=torch.float64, device=b.device)

    def of(self, rows: slice, w1: Tensor) -> Callable[[], None]:
        """Updates these rows, of which the weight is `w1`."""
        one, setting = self._one, self._one.matrix.setting
        m, n = one.matrix.w1.shape
        rms = abs(self._outlet.alpha) * one.part / one.scale / math.sqrt(m * n)
        first, unit = setting.first + rows.start * n, power_of_two(rms, FLOAT32_SCALE)

        def work() -> None:
            us = self._us[rows]
            self.sums += self._kernels.lowrank_update(
                w1, us, self._vh, w1, whole=m, key=setting.key, first=first, unit=unit
            )

        return work

    def facts(self, sums: Sequence[float]) -> MatrixFacts | NotFinite:
        """Of the matrix, once `sums` were fetched."""
        dot, square, bad = sums
        return facts_of(self._one, self._outlet, Retained(dot, square, bad == 0))


def _full_rank(matrix: Matrix, sample: Sample, run: Run) -> Outcomes:
    return tuple(_full_rank_into(outlet, matrix, sample, run) for outlet in matrix.outlets)


def _full_rank_into(outlet: Outlet, matrix: Matrix, sample: Sample, run: Run) -> MatrixFacts:
    w1, w0, alpha = matrix.w1, matrix.w0, outlet.alpha
    if outlet.take is not None:
        norm = _take_delta(outlet.take, w1, w0)
        return MatrixFacts(norm, sample.weight_norm, abs(alpha) * norm, None, "full rank", energy=1.0)

    def block(band: slice, part: slice, out: Tensor, first: int) -> Retained:
        return fullrank_update(w1[band, part], w0[band, part], alpha, out, key=matrix.setting.key, first=first)

    (kept,) = emit_tiles([Tiles(matrix, outlet.emit, block)], run)
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


def _take_delta(take: Take, w1: Tensor, w0: Tensor) -> float:
    """Delta itself as the product of two factors, one of which is the identity: its numbers stay those that they are.

    Returns its norm; raises NotFinite.
    """
    wide = torch.float64 if torch.float64 in (w1.dtype, w0.dtype) else torch.float32
    delta = w1.to(wide) - w0.to(wide)
    if not bool(delta.isfinite().all()):
        raise NotFinite(first_not_finite(w1, w0))
    identity = torch.eye(min(delta.shape), dtype=wide)
    take(*((identity, delta) if delta.shape[0] <= delta.shape[1] else (delta, identity)))
    return norm_of(delta)


@dataclass(frozen=True, slots=True)
class Tiles:
    """An output of a matrix that is to be computed."""

    matrix: Matrix
    emit: Emit
    block: Block


def emit_tiles(outputs: Sequence[Tiles], run: Run) -> list[Retained]:
    """Compute outputs of matrices of one shape in tiles of consecutive elements, and emit each; sums in order."""
    if not outputs:
        return []
    m, n = outputs[0].matrix.w1.shape
    columns = min(n, TILE_ELEMENTS)
    rows = max(1, TILE_ELEMENTS // columns)
    parts = -(-n // columns)
    count = -(-m // rows) * parts
    kept = [[Retained(0.0, 0.0)] * count for _ in outputs]

    def task(i: int) -> None:
        which, tile = divmod(i, count)
        top, left = (tile // parts) * rows, (tile % parts) * columns
        band, part = slice(top, min(top + rows, m)), slice(left, min(left + columns, n))
        output = outputs[which]
        out = scratch(OUT_SLOT, torch.Size((band.stop - band.start, part.stop - part.start)), output.matrix.dtype)
        first = top * n + left
        kept[which][tile] = output.block(band, part, out, output.matrix.setting.first + first)
        output.emit(first, out)

    run(task, len(outputs) * count)
    return [Retained(sum(k.dot for k in of), sum(k.square for k in of), all(k.finite for k in of)) for of in kept]


def _identical(w1: Tensor, w0: Tensor, run: Run) -> bool:
    rows = max(1, TILE_ELEMENTS // w1.shape[1])
    count = -(-w1.shape[0] // rows)
    same = [True] * count

    def task(i: int) -> None:
        band = slice(i * rows, (i + 1) * rows)
        same[i] = bool(((w1[band] == w0[band]) | (w1[band].isnan() & w0[band].isnan())).all())

    run(task, count)
    return all(same)


def facts_of(one: Solved, outlet: Outlet, kept: Retained | None) -> Outcome:
    """Of a matrix whose update was rounded, or not at all; NotFinite where that left the range of its dtype."""
    found, scale = one.found, one.scale
    if kept is not None and not kept.finite:
        dtype = str(one.matrix.dtype).removeprefix("torch.")
        return OutOfRange(f"the extrapolated weight is beyond the range of {dtype}")
    squares = float(found.s.double().square().sum())
    part = math.sqrt(squares)
    return MatrixFacts(
        delta_norm=math.sqrt(found.squared_norm) / scale,
        weight_norm=one.sample.weight_norm,
        update_norm=abs(outlet.alpha) * (part / scale),
        retention=None if kept is None else kept.retention,
        method=one.method,
        singular_values=tuple(s / scale for s in found.s.tolist()),
        radius=tuple(r / scale for r in found.radius),
        energy=min(1.0, squares / found.squared_norm),
        residual=found.residual,
        passes=found.passes,
        gap=found.gap,
        unique=found.unique,
        predicted_error=found.error / part,
        predicted_share=one.predicted_share(outlet.alpha),
        converged=found.converged,
    )
