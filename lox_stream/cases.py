"""Which matrices of a pair `bench` compares solvers on: one or a few of each shape, picked by a seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lox_stream import fp8
from lox_stream.delta import first_not_finite
from lox_stream.errors import DataError, OptionError
from lox_stream.matching import Step
from lox_stream.names import listing, matches, near_misses, printable, unmatched
from lox_stream.planning import Plan
from lox_stream.reader import matrix_of
from lox_stream.regions import Region, regions_of


@dataclass(frozen=True, slots=True)
class Choice:
    """One matrix (m, n) of a step."""

    step: Step
    region: Region

    @property
    def name(self) -> str:
        return self.step.name + self.region.label


def choose(plan: Plan, globs: Sequence[str], per_shape: int, seed: int) -> list[Choice]:
    """`per_shape` matrices of each shape and dtype among those that a run extrapolates, in the order of the files.

    Raises OptionError for a glob that matches none of them.
    """
    if plan.aligned.overlay is not None:
        raise OptionError(
            "--aligned is a LoRA adapter, whose difference is two thin factors: expected a whole model, for there is "
            "nothing to solve. Merge it first to compare solvers on it"
        )
    steps = [step for step in plan.steps if step.action == "extrapolate"]
    names = [step.name for step in steps]
    for glob in unmatched(globs, names):
        near = near_misses(glob, names)
        hint = f"Near: {listing(near)}" if near else "lox-stream run --dry-run lists them"
        raise OptionError(f"--tensors {printable(glob)!r} matches no matrix that a run would extrapolate. {hint}")
    classes: dict[tuple[int, int, str], list[Choice]] = {}
    for step in steps:
        if not globs or matches(step.name, globs):
            for region in regions_of(step):
                classes.setdefault((region.m, region.n, step.aligned.dtype), []).append(Choice(step, region))
    picked = [
        choice
        for shape, choices in classes.items()
        for choice in random.Random(f"{seed}:{shape}").sample(choices, min(per_shape, len(choices)))
    ]
    place = {id(step): number for number, step in enumerate(steps)}
    return sorted(picked, key=lambda choice: (place[id(choice.step)], choice.region.index))


def load(choice: Choice) -> tuple[Tensor, Tensor]:
    """(W1, W0), (m, n) each, in memory of their own. Raises DataError for NaN or Inf."""
    step = choice.step
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    with contextlib.ExitStack() as maps:
        w1 = matrix_of(fp8.elements(step.aligned, step.scaled, maps), choice.region).clone()
        w0 = matrix_of(fp8.elements(step.base, step.base_scaled, maps), choice.region).clone()
    if not (bool(w1.isfinite().all()) and bool(w0.isfinite().all())):
        where = first_not_finite(w1, w0)
        raise DataError(f"{printable(choice.name)}: {where}; expected finite numbers. Leave it out with --tensors")
    return w1, w0
