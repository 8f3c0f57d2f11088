"""Tensors, from their two maps to their places in the output: extrapolated, or copied."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
import xxhash
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lox_stream import fp8
from lox_stream.assembling import Assembly
from lox_stream.copying import InMemory, Target, as_bytes, copy_bytes, copy_from, emit_unchanged
from lox_stream.costs import together
from lox_stream.delta import NotFinite, OutOfRange
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.kernels import key_of
from lox_stream.kernels.cpu import TILE_ELEMENTS, Run
from lox_stream.matching import Step, covered, output_bytes, rescaled
from lox_stream.merging import change_of, update_by
from lox_stream.names import listing
from lox_stream.on_card import Cards
from lox_stream.options import Options, options_for
from lox_stream.reader import TORCH_DTYPES, mapped, matrix_at, matrix_of
from lox_stream.regions import Region, regions_of
from lox_stream.update import Matrix, Setting, extrapolate_matrices

Outcome = tuple[MatrixFacts, ...] | NotFinite  # of a step: an empty tuple for one that is copied
SUSPICIOUS = 0.5  # |delta| / |W| that fine-tuning does not give


def process(
    steps: Sequence[Step], place: Callable[[Step], Target], options: Options, run: Run, cards: Cards | None = None
) -> list[tuple[TensorFacts, Target]]:
    """Carry out a step, or several whose matrices have one shape and are solved together; on `cards` what they take.

    `place(step)` makes its target, a second time if the tensor has to be written anew. Raises DataError for NaN or Inf,
    unless `options.on_nonfinite` is "copy".
    """
    started = time.perf_counter()
    if rescaled(steps[0]):
        return _rescale(steps[0], steps[1], place, options, run, cards)
    if steps[0].factors is not None:
        return [_changed(step, place, options, run) for step in steps]
    targets = [place(step) for step in steps]
    outcomes: list[Outcome] = [()] * len(steps)
    told: list[list[str]] = [[] for _ in steps]
    if steps[0].action == "extrapolate":
        outcomes = _extrapolate(steps, targets, options, run, cards, told)
    finished = []
    for step, target, outcome, notices in zip(steps, targets, outcomes, told, strict=True):
        if step.action == "copy" or isinstance(outcome, NotFinite):
            target = place(step) if isinstance(outcome, NotFinite) else target
            copy_from(0, step, target, run)
        elif covered(step) < prod(step.aligned.shape):
            notices += _rows_left(step)
            copy_from(covered(step), step, target, run)
        elapsed_s = (time.perf_counter() - started) / len(steps)
        finished.append((_facts(step, outcome, notices, target.checksum(), elapsed_s), target))
    return finished


def _rescale(
    weight: Step, scales: Step, place: Callable[[Step], Target], options: Options, run: Run, cards: Cards | None
) -> list[tuple[TensorFacts, Target]]:
    """A weight of FP8 and its scales, both made anew; copied where nothing changes."""
    started = time.perf_counter()
    made, told = InMemory(weight.m * weight.n * torch.float32.itemsize), list[str]()
    (outcome,) = _extrapolate([weight], [made], options, run, cards, [told])
    targets = [place(weight), place(scales)]
    if isinstance(outcome, NotFinite) or all(matrix.method == "zero" for matrix in outcome):
        for step, target in zip((weight, scales), targets, strict=True):
            copy_from(0, step, target, run)
        rescaling = replace(_facts(scales, (), (), targets[1].checksum(), 0.0), action="copy")
    else:
        retention = _quantise(weight, made.data.view(torch.float32).view(weight.m, weight.n), targets, options, run)
        outcome = tuple(replace(matrix, retention=retention) for matrix in outcome)
        rescaling = _facts(scales, (), (), targets[1].checksum(), 0.0)
    elapsed_s = time.perf_counter() - started
    return [(_facts(weight, outcome, told, targets[0].checksum(), elapsed_s), targets[0]), (rescaling, targets[1])]


def _quantise(step: Step, total: Tensor, targets: Sequence[Target], options: Options, run: Run) -> float | None:
    """Write FP8 numbers and fresh scales of a float32 result; the share of the update that is left in them."""
    assert step.scaled is not None, "it is of FP8"
    (region,) = regions_of(step)
    key = _setting(step, options, region).key
    dtype, blocks = TORCH_DTYPES[step.aligned.dtype], step.scaled.blocks
    scale = fp8.fresh_scales(total, dtype, blocks, fp8.scales_of(step.scaled), run)
    q = torch.empty(total.shape, dtype=dtype)
    fp8.quantise(total, scale, blocks, q, key, run)
    copy_bytes(as_bytes(q), targets[0], 0, run)
    targets[1].write(0, as_bytes(scale))
    return fp8.retention(step.aligned, step.scaled, total, q, scale, run)


def _changed(step: Step, place: Callable[[Step], Target], options: Options, run: Run) -> tuple[TensorFacts, Target]:
    """A tensor that an adapter changes; one that is "copied" is what base and adapter make, as all of aligned is."""
    started = time.perf_counter()
    target = place(step)
    found = _by_factors(step, target, options, run, alone=step.action == "copy")
    outcome: Outcome = ()
    if isinstance(found, NotFinite):
        _require_bad_base(step)
        if step.action == "extrapolate":
            outcome = _accepted(step, NotFinite("base holds NaN or Inf"), options)
            target = place(step)
            _by_factors(step, target, options, run, alone=True)
    elif step.action == "extrapolate":
        outcome = (found,)
    return _facts(step, outcome, (), target.checksum(), time.perf_counter() - started), target


def _require_bad_base(step: Step) -> None:
    """What base holds may be written as it is; raises DataError where it is the sum that is no number."""
    with mapped(step.aligned) as data:
        w0 = torch.frombuffer(data, dtype=TORCH_DTYPES[step.aligned.dtype])
        if _finite(w0):
            raise DataError(
                f"{step.name}: base and the adapter's change together are beyond the range of "
                f"{step.dtype or step.aligned.dtype}. Write a wider --dtype"
            )


def _finite(numbers: Tensor) -> bool:
    """Whether all are, with a tile's worth of memory."""
    return all(bool(some.isfinite().all()) for some in numbers.split(TILE_ELEMENTS))  # type: ignore[no-untyped-call]


def _by_factors(step: Step, target: Target, options: Options, run: Run, *, alone: bool) -> MatrixFacts | NotFinite:
    """Write base's tensor changed by its factors, and by nothing more where these stand `alone`."""
    assert step.factors is not None, "planning gave it some"
    (region,) = regions_of(step)
    setting = _setting(step, options, region)

    def emit(first: int, tile: Tensor) -> None:
        target.write(first * tile.element_size(), as_bytes(tile))

    with mapped(step.aligned) as data:
        w0 = matrix_at(data, step.aligned.dtype, region)
        try:
            change = change_of(step.factors)
        except NotFinite as problem:
            raise DataError(f"{step.name}: {problem}; expected finite numbers. Save the adapter again") from problem
        alpha = 0.0 if alone else setting.options.alpha
        matrix = Matrix(w0, w0, setting, emit, rounded_to=TORCH_DTYPES[step.dtype] if step.dtype else None)
        return _emitted(matrix, update_by(change, matrix, alpha=alpha, run=run), run)


def _emitted(matrix: Matrix, facts: MatrixFacts | NotFinite, run: Run) -> MatrixFacts | NotFinite:
    """The facts once all is emitted: W1 as it is where there was nothing to add."""
    if isinstance(facts, MatrixFacts) and facts.method == "zero":
        return emit_unchanged(matrix, run) or facts
    return facts


def _facts(step: Step, outcome: Outcome, told: Sequence[str], checksum: str, elapsed_s: float) -> TensorFacts:
    action, reason = step.action, str(step.reason)
    matrices: tuple[MatrixFacts, ...] = ()
    notices: tuple[str, ...]
    if isinstance(outcome, NotFinite):
        done = "copied" if step.factors is None else "merged"
        action, reason, notices = "copy", "not finite", (f"{step.name}: {done} and not extrapolated: {outcome}",)
    else:
        matrices, notices = outcome, _suspicions(step, outcome)
        if matrices and all(matrix.method == "zero" for matrix in matrices):
            action, reason = "copy", "identical"
    return TensorFacts(
        name=step.name,
        action=action,
        reason=reason,
        n_bytes=output_bytes(step),
        elapsed_s=elapsed_s,
        checksum=checksum,
        matrices=matrices,
        notices=(*told, *notices),
    )


def _rows_left(step: Step) -> list[str]:
    """That a vocabulary grew, which rows base does not have, and whether these are numbers."""
    last = step.aligned.shape[0] - 1
    notices = [f"{step.name}: rows {step.m} to {last} are copied, for base has {step.m}; the others are extrapolated"]
    with contextlib.ExitStack() as maps:
        new = fp8.elements(step.aligned, step.scaled, maps)[covered(step) :]
        if not _finite(new):
            notices.append(f"{step.name}: NaN or Inf in rows {step.m} to {last}, which are copied as they are")
    return notices


def _extrapolate(
    steps: Sequence[Step],
    targets: Sequence[Target],
    options: Options,
    run: Run,
    cards: Cards | None,
    told: Sequence[list[str]],
) -> list[Outcome]:
    """For each step the facts of its matrices, or what is not finite in it; notices go to its list in `told`."""
    outcomes: list[Outcome] = [()] * len(steps)
    with contextlib.ExitStack() as maps:
        sources = [
            _source(step, target, options, run, maps, notices)
            for step, target, notices in zip(steps, targets, told, strict=True)
        ]
        for some in _batches(steps, options):
            try:
                found = _computed([sources[i](region) for i, region in some], run, cards)
            except LinAlgError as problem:  # of NaN that was not there in the pass that looks for it
                raise DataError(
                    f"{listing(steps[i].name for i, _ in some)}: no singular values were found: {problem} Was an input "
                    "changed while it was read? Start again with --overwrite, with inputs that stay as they are"
                ) from problem
            for (i, _), facts in zip(some, found, strict=True):
                before = outcomes[i]
                if isinstance(before, NotFinite):
                    continue
                outcomes[i] = _accepted(steps[i], facts, options) if isinstance(facts, NotFinite) else (*before, facts)
    return outcomes


def _batches(steps: Sequence[Step], options: Options) -> Iterator[list[tuple[int, Region]]]:
    """Matrices of one shape that are solved together, each with its step's index; those of a step in their order."""
    units = ((i, region) for i, step in enumerate(steps) for region in regions_of(step))
    for (m, n), alike in itertools.groupby(units, key=lambda unit: (unit[1].m, unit[1].n)):
        size = together(m, n, steps[0].rank, options.svd, options.memory_bytes)
        while some := list(itertools.islice(alike, size)):
            yield some


def _computed(matrices: Sequence[Matrix], run: Run, cards: Cards | None) -> list[MatrixFacts | NotFinite]:
    """The facts of each, once the last of its bytes was emitted."""
    if cards is not None and len(matrices) == 1 and cards.takes(matrices[0]):
        found = [cards.extrapolate(matrices[0], run)]
    else:
        found = extrapolate_matrices(matrices, run)
    return [_emitted(matrix, facts, run) for matrix, facts in zip(matrices, found, strict=True)]


def _accepted(step: Step, problem: NotFinite, options: Options) -> NotFinite:
    """The problem, if such tensors are to be copied; else it is raised."""
    if options.on_nonfinite == "copy":
        return problem
    copy = "Copy such tensors unchanged" if step.factors is None else "Merge such tensors and no more"
    if isinstance(problem, OutOfRange) and step.dtype:
        copy = "Write a wider --dtype; or, where aligned itself is within its range, copy such tensors"
    raise DataError(
        f"{step.name}: {problem}; expected finite numbers. {copy} with --on-nonfinite copy, or this one with "
        f"--skip '{step.name}'"
    ) from problem


def _source(
    step: Step, target: Target, options: Options, run: Run, maps: contextlib.ExitStack, told: list[str]
) -> Callable[[Region], Matrix]:
    """Makes the matrices of a step, over maps that are left open in `maps`; their notices go to `told`."""
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    aligned = fp8.elements(step.aligned, step.scaled, maps, run)
    base = fp8.elements(step.base, step.base_scaled, maps, run)
    assembly = Assembly(target)
    rounded_to = TORCH_DTYPES[step.dtype] if step.dtype else None
    judged_as = torch.bfloat16 if rescaled(step) else None  # finer than FP8

    def tell(notice: str) -> None:
        told.append(f"{step.name}: {notice}")

    def matrix(region: Region) -> Matrix:
        def emit(first: int, tile: Tensor) -> None:
            if region.groups == 1:
                target.write((region.start + region.first + first) * tile.element_size(), as_bytes(tile))
            else:
                assembly.add(region, first, tile)

        return Matrix(
            matrix_of(aligned, region),
            matrix_of(base, region),
            _setting(step, options, region),
            emit,
            tell,
            rounded_to,
            judged_as,
        )

    return matrix


def _setting(step: Step, options: Options, region: Region) -> Setting:
    """Randomness comes from the tensor's name, so no order of work and no resume changes a bit."""
    name = step.seed_name or step.name
    options = options_for(name, options)
    return Setting(
        options=options,
        rank=step.rank,
        seed=xxhash.xxh3_64_intdigest(f"{name}\0{region.index}".encode("utf-8", "surrogatepass")) >> 1,
        key=key_of(options.seed, name) if options.rounding == "stochastic" else None,
        first=region.words,
    )


def _suspicions(step: Step, matrices: tuple[MatrixFacts, ...]) -> tuple[str, ...]:
    worst = max((m.delta_norm / m.weight_norm for m in matrices if m.weight_norm > 0), default=0.0)
    if worst <= SUSPICIOUS:
        return ()
    return (f"{step.name}: |delta| is {worst:.2f} of |W|; fine-tuning gives a few percent. Is this the right base?",)
