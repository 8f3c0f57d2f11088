"""Tensors, from their two maps to their places in the outputs: extrapolated, or copied."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lox_stream import fp8
from lox_stream.blending import blended
from lox_stream.changing import changed
from lox_stream.copying import InMemory, Target, as_bytes, copy_bytes, copy_from, finite
from lox_stream.costs import together
from lox_stream.delta import NotFinite
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step, covered, rescaled
from lox_stream.names import listing, printable
from lox_stream.on_card import Cards
from lox_stream.options import Options
from lox_stream.outcomes import Found, accepted, facts_for, setting_of
from lox_stream.reader import TORCH_DTYPES, matrix_of
from lox_stream.regions import Region, regions_of
from lox_stream.sinks import Sink, TileSink, Use, Written, sink_of
from lox_stream.update import Matrix, Outcome, extrapolate_matrices


def process(tensors: Sequence[Sequence[Use]], run: Run, cards: Cards | None = None) -> list[list[Written]]:
    """Carry out a tensor in all outputs that have it, or several whose matrices have one shape and are solved together.

    Matrices are computed on `cards` if these take them. Raises DataError for NaN or Inf, unless `on_nonfinite` is
    "copy". A weight of FP8 comes with its scales, as the second of two tensors.
    """
    started = time.perf_counter()
    written: list[list[Written]] = [[] for _ in tensors]
    usual = [
        [use for use in uses if not (rescaled(use.step) or _scales(use.step) or use.step.factors or use.step.blend)]
        for uses in tensors
    ]
    works = [_Work([sink_of(use) for use in uses]) for uses in usual if uses]
    if any(work.changing for work in works):
        _extrapolate([work for work in works if work.changing], run, cards)
    for work in works:
        work.copy_the_rest(run)
    elapsed_s = (time.perf_counter() - started) / len(tensors)
    places = [i for i, uses in enumerate(usual) if uses]
    for i, work in zip(places, works, strict=True):
        written[i] += work.written(elapsed_s)
    for i, uses in enumerate(tensors):
        for use in uses:
            if use.step.blend:
                written[i] += [blended(use, run)]
            elif use.step.factors is not None:
                written[i] += [changed(use, run)]
            elif rescaled(use.step):
                weight, scales = _rescale(use, run, cards)
                written[i].append(weight)
                written[i + 1].append(scales)
    return written


def _scales(step: Step) -> bool:
    """Whether these are scales that are made anew with their weight."""
    return step.action == "rescale"


@dataclass(slots=True)
class _Work:
    """A tensor while it is computed for several outputs: where its results go, and what became of them."""

    sinks: list[Sink]
    found: list[Found] = field(default_factory=list)  # of each sink
    told: list[str] = field(default_factory=list)  # notices

    def __post_init__(self) -> None:
        self.found = [() for _ in self.sinks]

    @property
    def changing(self) -> list[int]:
        """The sinks of outputs in which the tensor is extrapolated."""
        return [i for i, sink in enumerate(self.sinks) if sink.use.step.action == "extrapolate"]

    @property
    def step(self) -> Step:
        """How it is extrapolated: for all that do so the same, but for alpha and rank; that of the largest rank."""
        return max((self.sinks[i].use.step for i in self.changing), key=lambda step: step.rank)

    @property
    def options(self) -> Options:
        return self.sinks[self.changing[0]].use.way.options

    def copy_the_rest(self, run: Run) -> None:
        """Where nothing is extrapolated, and what is not part of a matrix."""
        for sink, found in zip(self.sinks, self.found, strict=True):
            step = sink.use.step
            if step.action != "extrapolate":
                sink.copied(run, again=False)
            elif isinstance(found, NotFinite):
                sink.copied(run, again=True)
            else:
                sink.ended(run)
        if self.changing and covered(self.step) < prod(self.step.aligned.shape):
            self.told += _rows_left(self.step)

    def written(self, elapsed_s: float) -> list[Written]:
        told = [self.told if i in self.changing else [] for i in range(len(self.sinks))]
        return [
            written
            for sink, found, notices in zip(self.sinks, self.found, told, strict=True)
            for written in sink.written(found, notices, elapsed_s)
        ]


def _rescale(use: Use, run: Run, cards: Cards | None) -> tuple[Written, Written]:
    """A weight of FP8 and its scales, both made anew; copied where nothing changes."""
    started = time.perf_counter()
    weight, way = use.step, use.way
    assert weight.scaled is not None, "it is of FP8"
    scales = way.steps[weight.scaled.scale.name]
    made = InMemory(weight.m * weight.n * torch.float32.itemsize)
    work = _Work([TileSink(Use(weight, replace(way, place=lambda step: made)))])
    _extrapolate([work], run, cards)
    (outcome,) = work.found
    targets = [way.place(weight), way.place(scales)]
    if isinstance(outcome, NotFinite) or all(matrix.method == "zero" for matrix in outcome):
        for step, target in zip((weight, scales), targets, strict=True):
            copy_from(0, step, target, run)
        rescaling = replace(facts_for(scales, (), (), targets[1].checksum(), 0.0), action="copy")
    else:
        total = made.data.view(torch.float32).view(weight.m, weight.n)
        retention = _quantise(weight, total, targets, way.options, run)
        outcome = tuple(replace(matrix, retention=retention) for matrix in outcome)
        rescaling = facts_for(scales, (), (), targets[1].checksum(), 0.0)
    elapsed_s = time.perf_counter() - started
    facts = facts_for(weight, outcome, work.told, targets[0].checksum(), elapsed_s)
    return Written(use, facts, targets[0]), Written(Use(scales, way), rescaling, targets[1])


def _quantise(step: Step, total: Tensor, targets: Sequence[Target], options: Options, run: Run) -> float | None:
    """Write FP8 numbers and fresh scales of a float32 result; the share of the update that is left in them."""
    assert step.scaled is not None, "it is of FP8"
    (region,) = regions_of(step)
    key = setting_of(step, options, region).key
    dtype, blocks = TORCH_DTYPES[step.aligned.dtype], step.scaled.blocks
    scale = fp8.fresh_scales(total, dtype, blocks, fp8.scales_of(step.scaled), run)
    q = torch.empty(total.shape, dtype=dtype)
    fp8.quantise(total, scale, blocks, q, key, run)
    copy_bytes(as_bytes(q), targets[0], 0, run)
    targets[1].write(0, as_bytes(scale))
    return fp8.retention(step.aligned, step.scaled, total, q, scale, run)


def _rows_left(step: Step) -> list[str]:
    """That a vocabulary grew, which rows base does not have, and whether these are numbers."""
    last = step.aligned.shape[0] - 1
    done = "have no update" if step.pairs else "are copied"
    notices = [
        f"{printable(step.name)}: rows {step.m} to {last} {done}, for base has {step.m}; the others are extrapolated"
    ]
    with contextlib.ExitStack() as maps:
        new = fp8.elements(step.aligned, step.scaled, maps)[covered(step) :]
        if not finite(new):
            notices.append(f"{printable(step.name)}: NaN or Inf in rows {step.m} to {last}, which {done} as they are")
    return notices


def _extrapolate(works: Sequence[_Work], run: Run, cards: Cards | None) -> None:
    """Compute the matrices of these tensors into their sinks."""
    steps = [work.step for work in works]
    with contextlib.ExitStack() as maps:
        sources = [_source(work, run, maps) for work in works]
        for some in _batches(steps, works[0].options):
            units = [unit for i, region in some for unit in sources[i](region)]
            for rank in dict.fromkeys(unit.matrix.setting.rank for unit in units):
                alike = [unit for unit in units if unit.matrix.setting.rank == rank]
                try:
                    found = _solved([unit.matrix for unit in alike], run, cards)
                except LinAlgError as problem:  # of NaN that was not there in the pass that looks for it
                    raise DataError(
                        f"{listing(unit.work.step.name for unit in alike)}: no singular values were found: {problem} "
                        "Was an input changed while it was read? Start again with --overwrite, with inputs that stay "
                        "as they are"
                    ) from problem
                for unit, outcomes in zip(alike, found, strict=True):
                    _take(unit, outcomes, run)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A matrix of a tensor, and the sinks that what is solved of it goes to."""

    work: _Work
    region: Region
    sinks: list[int]
    matrix: Matrix


def _take(unit: _Unit, outcomes: Sequence[Outcome], run: Run) -> None:
    """What became of a matrix in each of the outputs; where there was nothing to add, W1 as it is."""
    work = unit.work
    for i, outcome in zip(unit.sinks, outcomes, strict=True):
        before, sink = work.found[i], work.sinks[i]
        if isinstance(before, NotFinite):
            continue
        if isinstance(outcome, MatrixFacts) and outcome.method == "zero":
            outcome = sink.unchanged(unit.region, unit.matrix, run) or outcome
        if isinstance(outcome, NotFinite):
            work.found[i] = accepted(work.step, outcome, sink.use.way.options)
        else:
            work.found[i] = (*before, outcome)


def _batches(steps: Sequence[Step], options: Options) -> Iterator[list[tuple[int, Region]]]:
    """Matrices of one shape that are solved together, each with its step's index; those of a step in their order."""
    units = ((i, region) for i, step in enumerate(steps) for region in regions_of(step))
    for (m, n), alike in itertools.groupby(units, key=lambda unit: (unit[1].m, unit[1].n)):
        size = together(m, n, steps[0].rank, options.svd, options.memory_bytes)
        while some := list(itertools.islice(alike, size)):
            yield some


def _solved(matrices: Sequence[Matrix], run: Run, cards: Cards | None) -> list[tuple[Outcome, ...]]:
    """The facts of each, once the last of its bytes was emitted."""
    if cards is not None and len(matrices) == 1 and cards.takes(matrices[0]):
        return [cards.extrapolate(matrices[0], run)]
    return extrapolate_matrices(matrices, run)


def _source(work: _Work, run: Run, maps: contextlib.ExitStack) -> Callable[[Region], list[_Unit]]:
    """Makes the matrices of a tensor, over maps that are left open in `maps`: one for each of the outputs' ranks."""
    step, options = work.step, work.options
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    aligned = fp8.elements(step.aligned, step.scaled, maps, run)
    base = fp8.elements(step.base, step.base_scaled, maps, run)
    rounded_to = TORCH_DTYPES[step.dtype] if step.dtype else None
    judged_as = torch.bfloat16 if rescaled(step) else None  # finer than FP8

    def tell(notice: str) -> None:
        work.told.append(f"{printable(step.name)}: {notice}")

    def units(region: Region) -> list[_Unit]:
        w1, w0 = matrix_of(aligned, region), matrix_of(base, region)
        settings = {i: setting_of(work.sinks[i].use.step, options, region) for i in work.changing}
        found = []
        for rank in dict.fromkeys(setting.rank for setting in settings.values()):
            sinks = [i for i, setting in settings.items() if setting.rank == rank]
            outlets = tuple(work.sinks[i].outlet(region) for i in sinks)
            matrix = Matrix(w1, w0, settings[sinks[0]], outlets, tell, rounded_to, judged_as)
            found.append(_Unit(work, region, sinks, matrix))
        return found

    return units
