"""Tensors that are looked at and no more: the pipeline of a run, with nothing written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from lox_stream.api import Reporter
from lox_stream.copying import InMemory
from lox_stream.facts import TensorFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step
from lox_stream.on_card import Cards
from lox_stream.options import Options
from lox_stream.pipeline import Finished, compute_all
from lox_stream.sinks import Use, Way, Written


def look_at(
    steps: Sequence[Step],
    options: Options,
    look: Callable[[Step, Run], None],
    report: Reporter,
    cancel: threading.Event | None,
    held_bytes: Callable[[Step], int] = lambda step: 0,
) -> None:
    """Call `look` for each step, from the computing threads, once its bytes were read; the CPU computes all of it.

    `held_bytes` is what a look takes beside what such a step takes in a run.
    """

    def process(tensors: Sequence[Sequence[Use]], run: Run, cards: Cards | None) -> list[list[Written]]:
        del cards
        for (use,) in tensors:
            look(use.step, run)
        return [[Written(use, _no_facts(use.step), use.way.place(use.step))] for (use,) in tensors]

    way = Way({step.name: step for step in steps}, options, lambda step: InMemory(0))
    events = compute_all([way], stop=cancel, held_bytes=held_bytes, procedure=process)
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Finished):
                report.count(event.step)
                report(())
            else:
                report(event.working)


def _no_facts(step: Step) -> TensorFacts:
    return TensorFacts(step.name, step.action, step.reason, 0, 0.0, "")
