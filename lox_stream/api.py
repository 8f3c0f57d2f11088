"""The library: `execute` carries out a plan, or several of one pair."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lox_stream.carrying import LeftOut
from lox_stream.device import settled
from lox_stream.documents import written_documents
from lox_stream.errors import Cancelled, OptionError
from lox_stream.facts import TensorFacts
from lox_stream.manifest import Totals, totals
from lox_stream.matching import Step, output_bytes, written_names
from lox_stream.options import check_platform, check_ways
from lox_stream.output_rules import is_new
from lox_stream.pipeline import Finished, compute_all, jobs_for
from lox_stream.planning import Plan
from lox_stream.reader import Source, read_bytes
from lox_stream.remarks import changed_bytes, plan_warnings, run_warnings
from lox_stream.repairing import finished_before, survey
from lox_stream.resuming import Damage, Survey, changed_inputs
from lox_stream.sinks import Way
from lox_stream.verifying import Check
from lox_stream.writer import Output


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Bytes are of the aligned checkpoint's tensors."""

    done_bytes: int
    total_bytes: int
    resumed_bytes: int  # of done_bytes, what an earlier session had finished
    done_tensors: int
    total_tensors: int
    working: tuple[str, ...]  # names of the tensors in work
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished run did."""

    out: Path
    totals: Totals
    elapsed_s: float
    read_bytes: int  # of both inputs, this session
    written_bytes: int  # this session
    warnings: tuple[str, ...]  # complete messages
    repaired: tuple[Damage, ...] | None = None  # what was damaged and is not any more; None: no repair was asked for
    left_out: tuple[LeftOut, ...] = ()  # of an adapter: what it cannot carry, and why


def execute(
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Summary:
    """Carry out a plan that was made with `out`.

    `resume` goes on with an unfinished folder, `overwrite` replaces an earlier output. `repair`, together with
    `resume`, checks every byte of a folder, finished or not, and makes again just what is not as it was written.

    `progress` is called from this thread several times a second. Setting `cancel` raises Cancelled within about a
    second; the folder can then be resumed. Raises LoxError of some kind.
    """
    (summary,) = execute_all(
        [plan], resume=resume, overwrite=overwrite, repair=repair, progress=progress, cancel=cancel
    )
    return summary


def execute_all(
    plans: Sequence[Plan],
    *,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
    source: Source | None = None,
    batch_s: float | None = None,
) -> list[Summary]:
    """`execute` for several outputs of one pair: every tensor is read and solved once, and written to each.

    The plans differ in `out`, and of their options in `alpha`, `rank` and `form` alone; the first one's say how it is
    computed. A matrix is solved once for each rank.
    `source` is what brings the weights here, of models that `reaching.reached` has laid out. What is finished is synced
    and journalled after `batch_s`, by default 30 seconds or 1 GiB.
    """
    if any(plan.out is None for plan in plans):
        raise OptionError("the plan has no output folder, expected plan(base, aligned, out)")
    check_ways(resume=resume, overwrite=overwrite, repair=repair)
    check_platform()
    plans = [settled(plan) for plan in plans]
    started = time.monotonic()
    cancel = cancel or threading.Event()
    if source is not None:
        source.room_for([job for plan in plans for job in jobs_for(plan)])
    in_parts = any(plan.options.part for plan in plans)
    several = resume and not repair and (len(plans) > 1 or in_parts)
    before = [finished_before(plan) if several else None for plan in plans]
    if all(facts is not None for facts in before) and not in_parts:
        before = [None] * len(plans)  # and so say what is said of one
    with contextlib.ExitStack() as stack:
        works = [
            _Work(
                plan,
                stack.enter_context(
                    Output(
                        plan,
                        resume=resume,
                        overwrite=overwrite,
                        look=_Looking(plan, progress, cancel) if repair and not _is_made_new(plan, plans) else None,
                        batch_s=batch_s,
                    )
                ),
            )
            for plan, facts in zip(plans, before, strict=True)
            if facts is None
        ]
        going = [work for work in works if not work.output.has_nothing_to_do]
        if going:
            _compute(
                going,
                Reporter(
                    [step for plan in plans for step in plan.steps],
                    [step for work in works for step in work.steps],
                    progress,
                    started,
                ),
                cancel,
                source,
            )
        published = iter([work.published(started) for work in works])
        summaries = [
            next(published) if facts is None else _left(plan, facts) for plan, facts in zip(plans, before, strict=True)
        ]
    told = tuple(source.warnings) if source is not None else ()
    return [replace(summary, warnings=(*summary.warnings, *told)) for summary in summaries]


def _is_made_new(plan: Plan, plans: Sequence[Plan]) -> bool:
    """Whether it is an output of several that is not there: nothing to repair."""
    return len(plans) > 1 and plan.out is not None and is_new(plan.out)


def _left(plan: Plan, facts: Mapping[str, TensorFacts]) -> Summary:
    """Of an output that an earlier session finished."""
    assert plan.out is not None, "a plan that writes has a folder"
    warnings = (*plan.warnings, f"{plan.out}: was finished before, and is left as it is")
    return Summary(plan.out, totals(facts.values()), 0.0, 0, 0, warnings, left_out=plan.left_out)


def _compute(works: Sequence[_Work], report: Reporter, cancel: threading.Event, source: Source | None = None) -> None:
    with contextlib.closing(compute_all([work.way for work in works], stop=cancel, source=source)) as events:
        report(())
        for event in events:
            if isinstance(event, Finished):
                works[event.way].output.done(event.facts)
                if event.facts.name == written_names(event.step)[-1]:
                    report.count(event.step)
                report(())
            else:
                report(event.working)


class _Work:
    """An output with its plan, and what is to do for it."""

    def __init__(self, plan: Plan, output: Output) -> None:
        self.plan, self.output = plan, output
        self.steps = [step for step in plan.steps if not output.finished.keys() >= {*written_names(step)}]
        self.way = Way(
            {step.name: step for step in self.steps},
            plan.options,
            lambda step: output.place(step.name),
            lambda info: output.place(info.name),
        )

    def published(self, started: float) -> Summary:
        """Make the finished output appear."""
        plan, output, steps = self.plan, self.output, self.steps
        if output.has_nothing_to_do:
            warnings: tuple[str, ...] = (*plan.warnings, *output.warnings)
            elapsed_s = time.monotonic() - started
            return Summary(output.folder, totals(output.finished.values()), elapsed_s, 0, 0, warnings, repaired=())
        found = (*changed_bytes(output.survey, output.finished), *run_warnings(output.finished.values(), plan.options))
        warnings = (*plan.warnings, *output.warnings, *changed_inputs(plan), *plan_warnings(plan), *found)
        elapsed_s = time.monotonic() - started
        output.publish(
            written_documents(
                plan,
                output.finished,
                elapsed_s=elapsed_s,
                sessions=output.sessions,
                warnings=warnings,
                began=output.inputs,
            )
        )
        return Summary(
            out=output.folder,
            totals=totals(output.finished.values()),
            elapsed_s=time.monotonic() - started,
            read_bytes=read_bytes(steps),
            written_bytes=sum(map(output_bytes, steps)),
            warnings=warnings,
            repaired=output.survey.damaged if output.survey is not None else None,
            left_out=plan.left_out,
        )


class _Looking:
    """A survey of the output of `plan`, with the caller's `progress` and his way to stop it."""

    def __init__(self, plan: Plan, progress: Callable[[Progress], None] | None, cancel: threading.Event) -> None:
        self._plan, self._cancel = plan, cancel
        self._report = Reporter(plan.steps, plan.steps, progress, time.monotonic())

    def __call__(self) -> Survey:
        return survey(self._plan, self._seen)

    def _seen(self, check: Check) -> None:
        if self._cancel.is_set():
            raise Cancelled("stopped on request")
        if check.part == "tensor":
            self._report.done_bytes += check.n_bytes
            self._report.done_tensors += 1
        self._report((check.name,))


class Reporter:
    """Counts what is finished of `all_steps`, of which `steps` are to do, and calls the caller's `progress`."""

    def __init__(
        self,
        all_steps: Sequence[Step],
        steps: Sequence[Step],
        progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self.progress, self.started = progress, started
        self.total_bytes = sum(step.aligned.n_bytes for step in all_steps)
        self.total_tensors = len(all_steps)
        self.resumed_bytes = self.total_bytes - sum(step.aligned.n_bytes for step in steps)
        self.done_bytes = self.resumed_bytes
        self.done_tensors = len(all_steps) - len(steps)

    def count(self, step: Step) -> None:
        self.done_bytes += step.aligned.n_bytes
        self.done_tensors += 1

    def __call__(self, working: tuple[str, ...]) -> None:
        if self.progress is not None:
            self.progress(
                Progress(
                    self.done_bytes,
                    self.total_bytes,
                    self.resumed_bytes,
                    self.done_tensors,
                    self.total_tensors,
                    working,
                    time.monotonic() - self.started,
                )
            )
