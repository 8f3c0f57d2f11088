"""Recomputing a sample of an output's matrices in float64, by a full SVD that shares no code with the solver.

The update of each matrix is taken anew from the two inputs, added in float64 and rounded once; then the output's
elements are compared bit by bit. A matrix passes when no more of them differ than twice the share that the manifest
predicts and 0.2 points (the prediction was right within 0.15 points wherever it was measured), and one element.
For float32 and float64, where nearly every element moves by an ulp, the update as a whole has to be right to 1e-4.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lox_stream import fp8
from lox_stream.adapters import Factors
from lox_stream.checkpoint import TensorInfo
from lox_stream.kernels import key_of
from lox_stream.kernels.random_words import words16
from lox_stream.matching import Step
from lox_stream.merging import factors_at, read_sides
from lox_stream.options import Options, options_for
from lox_stream.reader import TORCH_DTYPES, mapped, matrix_of
from lox_stream.regions import Region
from lox_stream.sampling import Sample, Unit
from lox_stream.scales import Scaled
from lox_stream.workers import Workers

SLACK = 0.002  # of the elements, and twice the predicted share
PIECE_ELEMENTS = 1 << 20
FACTOR_SLACK = 1e-3  # of the rank-k part, twice what the solver may leave for 16 bits; and rounding of the factors
WIDE_SLACK = 1e-4  # of |update|, for float32 and float64: ten times what the solver aims at
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
BITS |= {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


@dataclass(frozen=True, slots=True)
class Exact:
    """What a matrix should be: float64, (m, n) each."""

    update: Tensor  # alpha * rank-k part of delta
    total: Tensor  # W1 + update, before the rounding
    rest: float  # |alpha * (delta - rank-k part)|_F
    singular_values: tuple[float, ...]  # all of delta's, at most the first 32; () without an SVD


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one matrix of the output agrees with its float64 recomputation."""

    name: str  # with [index] in a stack
    shape: tuple[int, int]
    dtype: str
    kind: str  # "rank-k" | "full rank" | "factors", of an adapter | "merged", by an adapter | "copy"
    elements: int
    same: int  # bit by bit
    predicted_share: float | None  # of elements that differ, as the manifest says
    update_error: float | None  # |output - W1 - update|_F / |update|_F, rounding included
    unique: bool
    ok: bool
    elapsed_s: float
    singular_values: tuple[float, ...]  # the first ones, float64

    @property
    def share(self) -> float:
        return self.same / self.elements if self.elements else 1.0


def compare_all(sample: Sample) -> Iterator[Comparison]:
    """Recompute every matrix of the sample, and yield each as it is done.

    The caller's thread does not compute; `sample.workers` matrices are in work at once, each on one core.
    """
    results: queue.SimpleQueue[Comparison | BaseException] = queue.SimpleQueue()

    def job(unit: Unit) -> None:
        try:
            results.put(compare(unit, sample.options))
        except BaseException as problem:  # raised below
            results.put(problem)

    with Workers(sample.workers) as workers:
        for unit in sample.units:
            workers.submit(lambda unit=unit: job(unit))  # type: ignore[misc]
        for _ in sample.units:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result


def compare(unit: Unit, options: Options) -> Comparison:
    """One matrix of the output against its recomputation, or against the aligned one where it is a copy."""
    started = time.perf_counter()
    seen = _compare_copy(unit) if unit.copied else _compare_matrix(unit, options)
    low_rank = 0 < unit.step.rank < min(unit.shape)
    return Comparison(
        name=unit.name,
        shape=unit.shape,
        dtype=unit.step.aligned.dtype,
        kind=_kind(unit) or ("rank-k" if low_rank else "full rank"),
        elements=seen.elements,
        same=seen.same,
        predicted_share=unit.predicted_share,
        update_error=seen.update_error,
        unique=unit.unique,
        ok=seen.ok,
        elapsed_s=time.perf_counter() - started,
        singular_values=seen.singular_values,
    )


def _kind(unit: Unit) -> str:
    """What a matrix is checked as, where that is not its update in the weights."""
    if unit.factors is not None:
        return "factors"
    return "copy" if unit.copied else "merged" if unit.alone else ""


@dataclass(frozen=True, slots=True)
class _Seen:
    elements: int
    same: int
    ok: bool
    update_error: float | None = None
    singular_values: tuple[float, ...] = ()


def _compare_copy(unit: Unit) -> _Seen:
    """Elements are bytes here, whatever the dtype; unless that has changed."""
    if unit.step.dtype and unit.n_bytes:
        return _compare_converted(unit)
    with mapped(unit.step.aligned) as aligned, mapped(unit.out) as out:
        same = int((np.frombuffer(aligned, np.uint8) == np.frombuffer(out, np.uint8)).sum())
    return _Seen(unit.n_bytes, same, same == unit.n_bytes)


def _compare_converted(unit: Unit) -> _Seen:
    """A tensor that was rounded to another dtype and no more."""
    same = 0
    with contextlib.ExitStack() as maps:
        weight, out = fp8.elements(unit.step.aligned, unit.step.scaled, maps), fp8.elements(unit.out, None, maps)
        for first in range(0, out.numel(), PIECE_ELEMENTS):
            piece = slice(first, first + PIECE_ELEMENTS)
            right = rounded_once(weight[piece].double(), out.dtype)
            same += int((right.view(BITS[out.dtype]) == out[piece].view(BITS[out.dtype])).sum())
        return _Seen(out.numel(), same, same == out.numel())


def _compare_matrix(unit: Unit, options: Options) -> _Seen:
    step, region = unit.step, unit.region
    assert region is not None, "what has none is a copy"
    options = options_for(step.seed_name or step.name, options)
    with contextlib.ExitStack() as maps:
        w1, w0 = _pair(step, region, maps)
        if unit.factors is not None:
            return _compare_factors(w1, w0, unit.factors, step, unique=unit.unique)
        out = matrix_of(fp8.elements(unit.out, unit.out_scaled, maps), region).clone()
    key = key_of(options.seed, step.seed_name or step.name) if options.rounding == "stochastic" else None
    if unit.alone:
        return _compare_merged(w1, w0, out, rounded_once(w1, out.dtype, key, region.words))
    alpha = options.alpha
    exact = recomputed(w1, w0, step.rank, alpha)
    if unit.out_scaled is None:
        right, found, eps = rounded_once(exact.total, out.dtype, key, region.words), out, torch.finfo(out.dtype).eps
    else:
        right, found = _quantised(exact.total, unit.out, unit.out_scaled, key)
        eps = torch.finfo(found.dtype).eps
    same = int((right.view(BITS[right.dtype]) == found.view(BITS[found.dtype])).sum())
    done, norm = out.double() - w1.double(), float(exact.update.norm())
    error = float((done - exact.update).norm()) / norm if norm else None
    if not unit.unique:  # any of many parts is right, so what counts is how much of delta it leaves
        rest = float((done - alpha * (w1.double() - w0.double())).norm())
        ok = rest <= (1 + 1e-4) * exact.rest + _grid(out, eps)
    elif found.dtype not in (torch.float32, torch.float64):
        ok = w1.numel() - same <= w1.numel() * (2 * (unit.predicted_share or 0.0) + SLACK) + 1
    else:
        ok = error is None or error <= WIDE_SLACK + eps * float(w1.double().norm()) / norm
    return _Seen(w1.numel(), same, ok, error, exact.singular_values)


def _compare_factors(w1: Tensor, w0: Tensor, factors: Factors, step: Step, *, unique: bool) -> _Seen:
    """The product of two factors against the rank-k part; where that is one of many, by what it leaves of delta."""
    left, right = read_sides(factors)
    product = factors.scaling * (left @ right)[: w1.shape[0]]
    exact = recomputed(w1, w0, step.rank, 1.0)
    norm = float(exact.update.norm())
    error = float((product - exact.update).norm()) / norm if norm else None
    slack = FACTOR_SLACK + torch.finfo(TORCH_DTYPES[factors.b.dtype]).eps
    if unique:
        ok = error is None or error <= slack
    else:
        ok = float((w1.double() - w0.double() - product).norm()) <= (1 + slack) * exact.rest + slack * norm
    return _Seen(w1.numel(), w1.numel() if ok else 0, ok, error, exact.singular_values)


def _compare_merged(w1: Tensor, w0: Tensor, out: Tensor, right: Tensor) -> _Seen:
    """Base `w0`, changed by an adapter to `w1` (float64) and no more; where base holds no number, that stays."""
    numbers = w0.isfinite()
    same = (out == right) | (out.isnan() & right.isnan())
    change, wrong = (float((some.double() - of.double())[numbers].norm()) for some, of in ((w1, w0), (out, w1)))
    error = wrong / change if change else None
    ok = bool(same[~numbers].all())
    if out.dtype not in (torch.float32, torch.float64):
        ok &= int((~same).sum()) <= out.numel() * SLACK + 1
    else:
        ok &= wrong <= WIDE_SLACK * change + torch.finfo(out.dtype).eps * float(w1[numbers].norm())
    return _Seen(out.numel(), int(same.sum()), ok, error)


def _pair(step: Step, region: Region, maps: contextlib.ExitStack) -> tuple[Tensor, Tensor]:
    """(W1, W0); where an adapter makes W1 that is its product in float64, on W0."""
    w1 = matrix_of(fp8.elements(step.aligned, step.scaled, maps), region).clone()
    if step.factors is not None:
        left, right = read_sides(factors_at(step, region))
        return w1.double() + step.factors.scaling * (left @ right), w1
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    return w1, matrix_of(fp8.elements(step.base, step.base_scaled, maps), region).clone()


def _quantised(total: Tensor, info: TensorInfo, scaled: Scaled, key: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """The FP8 numbers that the exact result has with fresh scales, and those of the output."""
    dtype, blocks = TORCH_DTYPES[info.dtype], scaled.blocks
    right = torch.empty(total.shape, dtype=dtype)
    fp8.quantise(
        total.float(), fp8.fresh_scales(total.float(), dtype, blocks, fp8.scales_of(scaled)), blocks, right, key
    )
    with mapped(info) as data:
        return right, torch.frombuffer(data, dtype=dtype).view(total.shape).clone()


def _grid(out: Tensor, eps: float) -> float:
    """|ulp|_F: the most that rounding can have moved the matrix."""
    _, exponent = torch.frexp(out.double().abs().clamp(min=torch.finfo(out.dtype).tiny))
    return float(torch.ldexp(torch.full_like(out, eps, dtype=torch.float64), exponent - 1).norm())


def recomputed(w1: Tensor, w0: Tensor, rank: int, alpha: float) -> Exact:
    """W1 + alpha * rank-k part of (W1 - W0), (m, n) each, by LAPACK's full SVD in float64; rank 0 is full rank."""
    delta = w1.double() - w0.double()
    if not 0 < rank < min(delta.shape):
        return Exact(alpha * delta, w1.double() + alpha * delta, 0.0, ())
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    update = (u[:, :rank] * (alpha * s[:rank])) @ vh[:rank]
    return Exact(update, w1.double() + update, abs(alpha) * float(s[rank:].norm()), tuple(s[:32].tolist()))


def rounded_once(total: Tensor, dtype: torch.dtype, key: tuple[int, int] | None = None, first: int = 0) -> Tensor:
    """float64 `total` in `dtype`, rounded once: to nearest even, or with the words of `key` for 16 bits.

    torch takes float64 to bfloat16 through float32 and rounds twice; here a number is first brought onto the grid of
    its dtype (spacing 2^(e - p), e clamped at the subnormals), which makes the conversion exact.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return total.to(dtype)
    finfo = torch.finfo(dtype)
    value = total.numpy()
    _, exponent = np.frexp(value)
    lowest = round(math.log2(finfo.tiny))
    place = np.ldexp(finfo.eps, np.maximum(exponent - 1, lowest))
    if key is None:
        return torch.from_numpy(np.rint(value / place) * place).to(dtype)
    part = words16(first, value.size, key).reshape(value.shape) * 2.0**-16
    if dtype == torch.float16:  # as the kernels have it: towards the upper one
        return torch.from_numpy(np.floor(value / place + part) * place).to(dtype)
    return torch.from_numpy(np.copysign(np.floor(np.abs(value) / place + part) * place, value)).to(dtype)
