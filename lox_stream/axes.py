"""The two directions of a landscape, measured in one streamed pass over its three models."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable

import torch

from lox_stream.api import Progress, Reporter
from lox_stream.blending import numbers_of
from lox_stream.copying import finite
from lox_stream.errors import CheckpointError, DataError
from lox_stream.kernels.cpu import TILE_ELEMENTS, Run, scratch
from lox_stream.landscape_file import Axes
from lox_stream.looking import look_at
from lox_stream.matching import Step
from lox_stream.names import printable
from lox_stream.options import Options
from lox_stream.triples import SIDES, Models, measured_steps

PARALLEL = 1e-5  # sine of the least angle; float64 sums of rounded weights tell smaller ones, and they tell nothing

Sums = tuple[float, float, float]  # <d1, d1>, <d1, g>, <g, g> with g = finetuned - aligned


def measure(
    models: Models,
    options: Options,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Axes:
    """How the directions lie, all weights as one vector, in float64.

    Sums of tiles are added in their order, those of tensors exactly: neither threads nor files change a bit. Raises
    CheckpointError where there are no two directions, DataError for NaN or Inf.
    """
    steps = measured_steps(models)
    sums: dict[str, Sums] = {}

    def look(step: Step, run: Run) -> None:
        sums[step.name] = sums_of(step, run)

    look_at(steps, options, look, Reporter(steps, steps, progress, time.monotonic()), cancel)
    return axes_of(*(math.fsum(one[i] for one in sums.values()) for i in range(3)))


def axes_of(first: float, both: float, second: float) -> Axes:
    """The axes by the sums over all weights.

    >>> axes_of(4.0, 2.0, 2.0)
    Axes(c=0.5, lox_norm=2.0, finetuned_norm=1.4142135623730951, second_norm=1.0, angle_degrees=45.0)
    """
    for side, square in (("lox", first), ("finetuned", second)):
        if square == 0:
            problem = f"{side} and aligned hold the same weights, expected a difference"
            raise CheckpointError([f"{problem}: it is a direction of the landscape. Give another model as --{side}"])
    c = both / first
    rest = max(0.0, second - c * both)
    if rest <= PARALLEL**2 * second:
        raise CheckpointError(
            [
                f"finetuned - aligned is {c:.6g} times lox - aligned, expected a second direction. Give a model that "
                "was fine-tuned from aligned, or from LoX's output"
            ]
        )
    length = math.sqrt(rest)
    angle = math.degrees(math.atan2(length, both / math.sqrt(first)))
    return Axes(c, math.sqrt(first), math.sqrt(second), length, angle)


def sums_of(step: Step, run: Run) -> Sums:
    """Of one tensor. Raises DataError for NaN or Inf."""
    with contextlib.ExitStack() as maps:
        aligned, lox, tuned = (numbers_of(info, maps) for info in (step.aligned, *(info for _, info in step.blend)))
        tiles: list[Sums] = [(0.0, 0.0, 0.0)] * -(-aligned.numel() // TILE_ELEMENTS)

        def task(i: int) -> None:
            some = slice(i * TILE_ELEMENTS, (i + 1) * TILE_ELEMENTS)
            start, d1, g = (
                scratch(slot, side[some].shape, torch.float64).copy_(side[some])
                for slot, side in enumerate((aligned, lox, tuned))
            )
            d1.sub_(start)
            g.sub_(start)
            tiles[i] = float(d1.dot(d1)), float(d1.dot(g)), float(g.dot(g))

        run(task, len(tiles))
        first, both, second = (math.fsum(one[k] for one in tiles) for k in range(3))
        if not all(map(math.isfinite, (first, both, second))):
            bad = [side for side, some in zip(SIDES, (aligned, lox, tuned), strict=True) if not finite(some)]
            raise DataError(
                f"{printable(step.name)}: NaN or Inf in {' and '.join(bad) or 'a sum'}; expected finite numbers. Save "
                "the model again"
            )
    return first, both, second
