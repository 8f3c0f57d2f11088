"""Tensors that an adapter changes: base's, and the adapter's two factors, in one update; extrapolated, or merged."""

from __future__ import annotations

import time

import torch

from lox_stream.copying import Target, as_bytes, emit_unchanged, finite
from lox_stream.delta import NotFinite
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step
from lox_stream.merging import merged_by, update_by
from lox_stream.outcomes import Found, accepted, facts_for, setting_of
from lox_stream.reader import TORCH_DTYPES, mapped, matrix_at
from lox_stream.regions import regions_of
from lox_stream.sinks import Use, Written
from lox_stream.update import Matrix, Outlet


def changed(use: Use, run: Run) -> Written:
    """A tensor that an adapter changes; one that is merged is what base and adapter make, as all of aligned is."""
    started = time.perf_counter()
    step, target = use.step, use.way.place(use.step)
    outcome = _by_factors(use, target, run, merged=step.action == "merge")
    found: Found = outcome if isinstance(outcome, NotFinite) else (outcome,)
    if isinstance(outcome, NotFinite):
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
                f"{step.name}: base and the adapter's change together are beyond the range of "
                f"{step.dtype or step.aligned.dtype}. Write a wider --dtype"
            )


def _by_factors(use: Use, target: Target, run: Run, *, merged: bool) -> MatrixFacts | NotFinite:
    """Write base's tensor changed by its factors, and by nothing more where these are `merged`."""
    step = use.step
    assert step.factors is not None, "planning gave it some"
    (region,) = regions_of(step)
    setting = setting_of(step, use.way.options, region)

    def emit(first: int, tile: torch.Tensor) -> None:
        target.write(first * tile.element_size(), as_bytes(tile))

    with mapped(step.aligned) as data:
        w0 = matrix_at(data, step.aligned.dtype, region)
        outlet = Outlet(setting.options.alpha, emit)
        dtype = TORCH_DTYPES[step.dtype] if step.dtype else None
        matrix = Matrix(w0, w0, setting, (outlet,), rounded_to=dtype)
        try:
            facts = (merged_by if merged else update_by)(step.factors, matrix, run)
        except NotFinite as problem:
            raise DataError(f"{step.name}: {problem}; expected finite numbers. Save the adapter again") from problem
        if isinstance(facts, MatrixFacts) and facts.method == "zero":
            return emit_unchanged(matrix, emit, run) or facts
        return facts
