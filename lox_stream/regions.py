"""Where the matrices of a step lie in their tensor: one, a stack of them, or the parts of fused ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lox_stream.fused import Part
from lox_stream.matching import Step


@dataclass(frozen=True, slots=True)
class Region:
    """One matrix (m, n) of a tensor.

    Of the `span` elements of the tensor from `start` on, cut into `groups` of one length, it is those from `first` on
    in each. With one group it lies in one piece.
    """

    index: int  # among the tensor's matrices
    label: str  # "", or "[3]" in a stack, "[q]" of a fused one, "[3][gate]"
    m: int
    n: int
    start: int
    span: int
    groups: int
    first: int
    words: int  # number of its first element where the parts lie one behind the other: in one piece, its place


def regions_of(step: Step) -> Iterator[Region]:
    """The matrices of a step, in the order of their facts in the manifest."""
    span, parts = step.m * step.n, parts_of_each(step)
    for number in range(step.count):
        stacked = f"[{number}]" if step.count > 1 else ""
        words = number * span
        for index, part in enumerate(parts, number * len(parts)):
            label = stacked + (f"[{part.label}]" if part.label else "")
            yield Region(index, label, part.m, part.n, number * span, span, part.groups, part.first, words)
            words += part.m * part.n


def parts_of_each(step: Step) -> tuple[Part, ...]:
    """Those of each matrix of a step's stack: itself where it is not split."""
    return step.parts or (Part("", step.m, step.n, 1, 0),)


def matrix_count(step: Step) -> int:
    """How many matrices a step has."""
    return step.count * len(parts_of_each(step))
