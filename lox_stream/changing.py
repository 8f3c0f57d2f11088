"""Tensors that an adapter changes: base's, and the adapter's two factors, in one update; extrapolated, or merged."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lox_stream.copying import Target, as_bytes, emit_unchanged, finite
from lox_stream.delta import NotFinite
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step
from lox_stream.merging import factors_at, merged_by, update_by
from lox_stream.names import printable
from lox_stream.outcomes import Found, accepted, facts_for, setting_of
from lox_stream.reader import TORCH_DTYPES, mapped, matrix_at
from lox_stream.regions import Region, regions_of
from lox_stream.sinks import Use, Written
from lox_stream.update import Matrix, Outlet


def changed(use: Use, run: Run) -> Written:
    """A tensor that an adapter changes; one that is merged is what base and adapter make, as all of aligned is."""
    started = time.perf_counter()
    step, target = use.step, use.way.place(use.step)
    found = _by_factors(use, target, run, merged=step.action == "merge")
    if isinstance(found, NotFinite):
        _require_bad_base(step)
        if step.action == "extrapolate":
            found = accepted(step, NotFinite("base holds NaN or Inf"), use.way.options)
            target = use.way.place(step)
            _by_factors(use, target, run, merged=True)
        else:
            found = ()  # what base holds is merged as it is
    return Written(use, facts_for(step, found, (), target.checksum(), time.perf_counter() - started), target)


def _require_bad_base(step: Step) -> None:
    """What base holds may be written as it is; raises DataError where it is the sum that is no number."""
    with mapped(step.aligned) as data:
        w0 = torch.frombuffer(data, dtype=TORCH_DTYPES[step.aligned.dtype])
        if finite(w0):
            raise DataError(
                f"{printable(step.name)}: base and the adapter's change together are beyond the range of "
                f"{step.dtype or step.aligned.dtype}. Write a wider --dtype"
            )


def _by_factors(use: Use, target: Target, run: Run, *, merged: bool) -> Found:
    """Write base's tensor changed by its factors, and by nothing more where these are `merged`.

    All of it, also where one matrix of a stack is not finite.
    """
    step, found, problem = use.step, [], None
    with mapped(step.aligned) as data:
        for region in regions_of(step):
            w0 = matrix_at(data, step.aligned.dtype, region)
            outcome = _one_by_factors(use, target, region, w0, run, merged=merged)
            if isinstance(outcome, NotFinite):
                problem = problem or outcome
            else:
                found.append(outcome)
    return problem or tuple(found)


def _one_by_factors(
    use: Use, target: Target, region: Region, w0: Tensor, run: Run, *, merged: bool
) -> MatrixFacts | NotFinite:
    step, setting = use.step, setting_of(use.step, use.way.options, region)

    def emit(first: int, tile: Tensor) -> None:
        target.write((region.start + first) * tile.element_size(), as_bytes(tile))

    outlet = Outlet(setting.options.alpha, emit)
    matrix = Matrix(w0, w0, setting, (outlet,), rounded_to=TORCH_DTYPES[step.dtype] if step.dtype else None)
    try:
        facts = (merged_by if merged else update_by)(factors_at(step, region), matrix, run)
    except NotFinite as problem:
        raise DataError(
            f"{printable(step.name)}: {problem}; expected finite numbers. Save the adapter again"
        ) from problem
    if isinstance(facts, MatrixFacts) and facts.method == "zero":
        return emit_unchanged(matrix, emit, run) or facts
    return facts
