"""Overlaps reading, solving, updating and writing: the only place that sees every stage.

    Prefetch thread --fetched--> admission, here --job--> Workers --finished--> the caller of `compute`

One queue carries all events to the thread that runs this generator; it admits and hands over, and never computes. A job
is one tensor, or some small ones of one shape that lie near each other and are solved together.
"""

from __future__ import annotations

import itertools
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial

from lox_stream import costs
from lox_stream.copying import Target
from lox_stream.device import cards_of
from lox_stream.errors import Cancelled
from lox_stream.facts import TensorFacts
from lox_stream.kernels.cpu import Run
from lox_stream.matching import Step, rescaled
from lox_stream.on_card import Cards
from lox_stream.options import Options, thread_count
from lox_stream.planning import Plan, memory_needed, steps_together
from lox_stream.processing import process
from lox_stream.reader import Prefetch, Source
from lox_stream.sinks import Use, Way, Written
from lox_stream.workers import Workers

TICK_S = 0.1
WINDOW_BYTES = 2 << 30  # input that waits in the page cache, at most
SPAN_BYTES = 64 << 20  # of aligned, from the first to the last step of a job
FIRST = 8  # jobs that may change places

Job = tuple[int, ...]  # indices of the steps that are carried out together
Procedure = Callable[[Sequence[Sequence[Use]], Run, Cards | None], list[list[Written]]]


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor of an output whose last byte was written to its target."""

    step: Step
    facts: TensorFacts
    target: Target
    way: int = 0  # number of the output


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing new; the names in work. Lets a caller draw progress, and look for its own reasons to stop."""

    working: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    job: Job
    finished: list[list[Finished]]  # of each of its tensors, in all outputs


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Fetched:
    pass


_Event = _Done | _Failed | _Fetched


def compute(
    steps: Sequence[Step],
    place: Callable[[Step], Target],
    options: Options,
    *,
    stop: threading.Event | None = None,
    in_order: bool = False,
    held_bytes: Callable[[Step], int] = lambda step: 0,
) -> Generator[Finished | Tick, None, None]:
    """Carry out the steps and yield each as it finishes, or `in_order`, with ticks in between.

    `place(step)` makes the target. `held_bytes(step)` is what the target keeps in memory until the caller asks for
    the event after it. Setting `stop` raises Cancelled at the next tile, and ends the threads though nobody asks for
    another event; closing the generator stops too. Our own
    buffers stay within `options.memory_bytes`, except that one job is always admitted.
    """
    way = Way({step.name: step for step in steps}, options, place)
    return compute_all([way], stop=stop, in_order=in_order, held_bytes=held_bytes)


def compute_all(
    ways: Sequence[Way],
    *,
    stop: threading.Event | None = None,
    in_order: bool = False,
    held_bytes: Callable[[Step], int] = lambda step: 0,
    source: Source | None = None,
    procedure: Procedure | None = None,
) -> Generator[Finished | Tick, None, None]:
    """`compute` for several outputs of one pair: each tensor is read and solved once, for all that have it.

    The first output's options say how it is computed. A tensor's events come one after the other. `source` brings
    weights here that lie elsewhere. `procedure` is what is done with the
    tensors of a job; by default they are extrapolated.
    """
    options = ways[0].options
    steps = _leaders(ways)
    cards = cards_of(options)
    count = 0 if cards is None else len(cards)
    threads = max(thread_count(options), count * costs.CARD_THREADS)
    if cards is not None:
        cards.bound(threads)
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    jobs = jobs_of(steps, options)
    if not in_order:
        jobs = smallest_first(jobs, steps)
    if source is not None:
        source.expect([[steps[index] for index in job] for job in jobs])
    costs_of = [_memory_for(step, ways) + held_bytes(step) for step in steps]
    admission = _Admission(costs_of, jobs, options, threads, count * costs.PINNED_BYTES)
    parked: dict[int, list[Finished]] = {}
    with nullcontext() if cards is None else closing(cards), Workers(threads, stop) as workers:
        reading = Prefetch(
            [[steps[index] for index in job] for job in jobs],
            min(WINDOW_BYTES, options.memory_bytes),
            lambda: events.put(_Fetched()),
            lambda error: events.put(_Failed(error)),
            source,
            stop,
        )
        try:
            following = 0
            while following < len(steps):
                if stop is not None and stop.is_set():
                    raise Cancelled("stopped on request")
                for job in admission.admit():
                    uses = [_uses(steps[i], ways) for i in job]
                    workers.submit(
                        _work(job, ways, partial(procedure or process, uses, workers.run, cards), workers, events)
                    )
                try:
                    event = events.get(timeout=TICK_S)
                except queue.Empty:
                    yield Tick(tuple(steps[index].name for job in admission.working for index in job))
                    continue
                if isinstance(event, _Failed):
                    raise event.error
                if isinstance(event, _Fetched):
                    admission.fetched += 1
                    continue
                admission.done(event.job)
                reading.release([steps[index] for index in event.job])
                parked.update(zip(event.job, event.finished, strict=True))
                ready = [following] if in_order else list(event.job)
                for index in ready:
                    if index in parked:
                        yield from parked.pop(index)
                        admission.release(index)
                        following += 1
                        if in_order:
                            ready.append(following)
        except BaseException:
            workers.stop.set()
            raise
        finally:
            reading.close()


def _leaders(ways: Sequence[Way]) -> list[Step]:
    """Each tensor once, in the order of aligned's files, as the output has it that takes most to make."""
    found: dict[str, Step] = {}
    for way in ways:
        for name, step in way.steps.items():
            if name not in found or _effort(step) > _effort(found[name]):
                found[name] = step
    if len(ways) == 1:
        return list(found.values())
    return sorted(found.values(), key=lambda step: (str(step.aligned.path), step.aligned.start))


def _effort(step: Step) -> tuple[bool, bool, int]:
    return rescaled(step) or step.action == "rescale", step.action == "extrapolate", step.rank


def _memory_for(leader: Step, ways: Sequence[Way]) -> int:
    """Of a tensor in all outputs, of which each holds what it puts together, or quantises."""
    uses = _uses(leader, ways)
    several = any(use.step.parts or rescaled(use.step) for use in uses)
    needed = [memory_needed(use.step, use.way.options) for use in uses]
    return sum(needed) if several else max(needed)


def _uses(leader: Step, ways: Sequence[Way]) -> list[Use]:
    return [Use(way.steps[leader.name], way) for way in ways if leader.name in way.steps]


def jobs_of(steps: Sequence[Step], options: Options) -> list[Job]:
    """Every step's index once; jobs in the order of their first, the steps of a job within SPAN_BYTES of one file.

    A weight of FP8 and its scales are a job of their own, in this order.
    """
    jobs: list[list[int]] = []
    latest: dict[tuple[object, ...], int] = {}  # of a shape and rank: its job
    ends = list(itertools.accumulate(step.aligned.n_bytes for step in steps))
    span = min(SPAN_BYTES, options.memory_bytes // 16)
    pairs = _pairs(steps)
    for index, step in enumerate(steps):
        if index in pairs:
            jobs.append([index, pairs[index]])
        if index in pairs or index in pairs.values():
            continue
        files = step.aligned.path, step.base and step.base.path  # which a scratch has to hold
        shape = *files, step.count, step.m, step.n, step.rank, step.parts
        job = jobs[latest[shape]] if shape in latest else []
        if job and len(job) < steps_together(step, options) and ends[index] - ends[job[0]] <= span:
            job.append(index)
        else:
            latest[shape] = len(jobs)
            jobs.append([index])
    return [tuple(job) for job in jobs]


def jobs_for(plan: Plan) -> list[list[Step]]:
    """The same of a plan: the steps of each job."""
    return [[plan.steps[index] for index in job] for job in jobs_of(plan.steps, plan.options)]


def _pairs(steps: Sequence[Step]) -> dict[int, int]:
    """The index of the scales that are made anew with a weight, by the weight's."""
    at = {step.name: index for index, step in enumerate(steps)}
    return {at[step.name]: at[step.scaled.scale.name] for step in steps if step.scaled and rescaled(step)}


def smallest_first(jobs: Sequence[Job], steps: Sequence[Step]) -> list[Job]:
    """The first few jobs by their bytes, so that there is work while the first large tensor is read."""
    return [*sorted(jobs[:FIRST], key=lambda job: sum(steps[index].aligned.n_bytes for index in job)), *jobs[FIRST:]]


class _Admission:
    """Which jobs may be in work: in order, when their bytes have been read, within the memory budget."""

    def __init__(
        self,
        cost: Sequence[int],
        jobs: Sequence[Job],
        options: Options,
        threads: int,
        pinned_bytes: int,
    ) -> None:
        self.cost = cost  # bytes of each step
        own = costs.thread_bytes(threads) + pinned_bytes
        self.budget = max(options.memory_bytes - own, options.memory_bytes // 4)
        self.most = threads + 1
        self.working: set[Job] = set()
        self.fetched = 0  # jobs that were read and not admitted yet
        self._waiting = deque(jobs)
        self._held = 0

    def admit(self) -> Iterator[Job]:
        while self.fetched and self._fits(self._waiting[0]):
            job = self._waiting.popleft()
            self.fetched -= 1
            self._held += self._cost(job)
            self.working.add(job)
            yield job

    def _cost(self, job: Job) -> int:
        return sum(self.cost[index] for index in job)

    def _fits(self, job: Job) -> bool:
        """Where nothing is in work, the caller waits for this one, whatever it costs."""
        room = len(self.working) < self.most and self._held + self._cost(job) <= self.budget
        return room or not self.working

    def done(self, job: Job) -> None:
        """Computed; its memory is held until each step is released."""
        self.working.remove(job)

    def release(self, index: int) -> None:
        self._held -= self.cost[index]


def _work(
    job: Job,
    ways: Sequence[Way],
    carry_out: Callable[[], list[list[Written]]],
    workers: Workers,
    events: queue.SimpleQueue[_Event],
) -> Callable[[], None]:
    def work() -> None:
        try:
            workers.check()
            written = carry_out()
        except BaseException as problem:  # raised where the events are read
            traceback.clear_frames(problem.__traceback__)  # which hold maps, and a GPU's memory
            if problem.__cause__ is not None:
                traceback.clear_frames(problem.__cause__.__traceback__)
            events.put(_Failed(problem))
        else:
            numbers = {id(way): number for number, way in enumerate(ways)}
            events.put(_Done(job, [[_finished(one, numbers) for one in of] for of in written]))

    return work


def _finished(one: Written, numbers: Mapping[int, int]) -> Finished:
    return Finished(one.use.step, one.facts, one.target, numbers[id(one.use.way)])
