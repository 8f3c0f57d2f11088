"""One tensor, from its two maps to its place in the output: extrapolated, or copied."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from lox_stream.delta import NotFinite
from lox_stream.errors import DataError
from lox_stream.facts import MatrixFacts, TensorFacts
from lox_stream.kernels import key_of
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step
from lox_stream.options import Options
from lox_stream.reader import TORCH_DTYPES, mapped
from lox_stream.update import Setting, extrapolate_matrix

COPY_BYTES = 1 << 20
SUSPICIOUS = 0.5  # |delta| / |W| that fine-tuning does not give


class Target(Protocol):
    """Where a tensor's bytes go; called from several threads, each byte once."""

    def write(self, offset: int, data: memoryview) -> None: ...

    def checksum(self) -> str: ...


def process(step: Step, place: Callable[[], Target], options: Options, run: Run) -> tuple[TensorFacts, Target]:
    """Carry out a step. `place` makes its target, a second time if the tensor has to be written anew.

    Raises DataError for NaN or Inf, unless `options.on_nonfinite` is "copy".
    """
    started = time.perf_counter()
    target, action, reason = place(), step.action, str(step.reason)
    matrices: tuple[MatrixFacts, ...] = ()
    notices: tuple[str, ...] = ()
    if step.action == "copy":
        _copy_all(step, target, run)
    else:
        try:
            matrices = _extrapolate(step, target, options, run)
        except NotFinite as problem:
            if options.on_nonfinite == "error":
                raise DataError(
                    f"{step.name}: {problem}; expected finite numbers. Copy such tensors unchanged with "
                    f"--on-nonfinite copy, or this one with --skip '{step.name}'"
                ) from problem
            target, action, reason = place(), "copy", "not finite"
            notices = (f"{step.name}: copied unchanged: {problem}",)
            _copy_all(step, target, run)
        else:
            notices = _suspicions(step, matrices)
            if all(matrix.method == "zero" for matrix in matrices):
                action, reason = "copy", "identical"
    facts = TensorFacts(
        name=step.name,
        action=action,
        reason=reason,
        n_bytes=step.aligned.n_bytes,
        elapsed_s=time.perf_counter() - started,
        checksum=target.checksum(),
        matrices=matrices,
        notices=notices,
    )
    return facts, target


def _extrapolate(step: Step, target: Target, options: Options, run: Run) -> tuple[MatrixFacts, ...]:
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    size = step.m * step.n
    facts = []
    with mapped(step.aligned) as aligned, mapped(step.base) as base:
        w1 = _stack(aligned, step.aligned.dtype, step)
        w0 = _stack(base, step.base.dtype, step)
        for index in range(step.count):
            offset = index * size * w1.element_size()

            def emit(first: int, tile: Tensor, offset: int = offset) -> None:
                target.write(offset + first * tile.element_size(), as_bytes(tile))

            matrix = extrapolate_matrix(w1[index], w0[index], _setting(step, options, index), emit, run)
            if matrix.method == "zero":
                _copy(aligned[offset : offset + size * w1.element_size()], target, offset, run)
            facts.append(matrix)
    return tuple(facts)


def _stack(data: memoryview, dtype: str, step: Step) -> Tensor:
    """A float tensor's bytes as (count, m, n) of its dtype; nothing is copied."""
    flat = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype], count=step.count * step.m * step.n)
    return flat.view(step.count, step.m, step.n)


def _setting(step: Step, options: Options, index: int) -> Setting:
    """Randomness comes from the tensor's name, so no order of work and no resume changes a bit."""
    name = step.seed_name or step.name
    return Setting(
        options=options,
        rank=step.rank,
        seed=xxhash.xxh3_64_intdigest(f"{name}\0{index}".encode("utf-8", "surrogatepass")) >> 1,
        key=key_of(options.seed, name) if options.rounding == "stochastic" else None,
        first=index * step.m * step.n,
    )


def _copy_all(step: Step, target: Target, run: Run) -> None:
    with mapped(step.aligned) as data:
        _copy(data, target, 0, run)


def _copy(data: memoryview, target: Target, offset: int, run: Run) -> None:
    def task(i: int) -> None:
        target.write(offset + i * COPY_BYTES, data[i * COPY_BYTES : (i + 1) * COPY_BYTES])

    run(task, -(-len(data) // COPY_BYTES))


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _suspicions(step: Step, matrices: tuple[MatrixFacts, ...]) -> tuple[str, ...]:
    worst = max((m.delta_norm / m.weight_norm for m in matrices if m.weight_norm > 0), default=0.0)
    if worst <= SUSPICIOUS:
        return ()
    return (f"{step.name}: |delta| is {worst:.2f} of |W|; fine-tuning gives a few percent. Is this the right base?",)
