"""What a run will move, hold and take, from its plan and the rates of a machine, before there is such a machine."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from lox_stream import costs
from lox_stream.errors import DeviceError, OptionError
from lox_stream.fused import Part
from lox_stream.matching import Step, output_bytes
from lox_stream.options import Options, gpu_count, is_gpu, parse_size, thread_count
from lox_stream.planning import Plan, card_memory_needed, memory_needed, steps_together, too_large
from lox_stream.regions import parts_of_each

PASSES = 6  # of both products over a difference; 4 to 9 on what training leaves, 20 and more on noise
CORE_RATE = 2.9e9  # bytes of both weights that a core multiplies a second: delta_normal in benchmarks/results
OTHER_S, OTHER_SMALL_S = 1.0e-9, 2.6e-9  # core seconds a byte of both weights for all else; `costs.kept` says small.
# Fitted to three models; benchmarks/check_model.py prints how far off these come out, and one that is none of them


@dataclass(frozen=True, slots=True)
class Machine:
    """What is assumed of a machine. Rates are in bytes a second; what is 0 is not known, and its time not predicted."""

    disk: float = 0.0  # reading and writing together
    pcie: float = 0.0  # to the GPU, and as much from it at the same time
    gpu: float = 0.0  # of the GPU's memory
    card: float = 0.0  # bytes of that memory; 0: as much as a matrix may need
    cores: float = 0.0
    core: float = CORE_RATE
    passes: float = PASSES


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that are moved and held, and the seconds that each part is busy; they overlap."""

    read_bytes: int
    written_bytes: int
    host_bytes: int  # of our own buffers at most: the steps in work, the threads' tiles, and pinned for a card
    gpu_bytes: int  # of the largest matrix on a card, as it goes there; 0 without one
    in_blocks: int  # tensors that go to the card in blocks, for they are larger than its memory
    passes: float
    busy_s: dict[str, float]  # "disk", "cores", "pcie", "gpu": those whose rates are known
    elapsed_s: float | None  # of the busiest part; None if nothing is known

    def record(self) -> dict[str, Any]:
        return asdict(self)


def parse_machine(text: str) -> Machine:
    """A machine as `disk=7GB/s,pcie=25GB/s,gpu=3TB/s,cores=32`. Raises OptionError.

    >>> parse_machine("disk=7GB/s,cores=8").disk
    7000000000.0
    """
    known = {field.name for field in fields(Machine)}
    given: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value:
            raise OptionError(f"--assume {part!r}: expected one of {', '.join(sorted(known))}, such as disk=7GB/s")
        if name in given:
            raise OptionError(f"--assume {part!r}: {name} is given twice, expected once. Leave one out")
        given[name] = _number(part, name, value)
    return Machine(**given)


def _number(part: str, name: str, value: str) -> float:
    try:
        if name in ("cores", "passes"):
            number = float(value)
            if not 0 < number < math.inf:
                raise ValueError
            return number
        size = float(parse_size(value if name == "card" else value.removesuffix("/s")))
        if size < 1000:  # a unit was forgotten
            raise ValueError
        return size
    except (ValueError, OptionError):
        wanted = {"cores": "a number over 0", "passes": "a number over 0", "card": "a size such as 24GB"}.get(
            name, "a rate such as 7GB/s"
        )
        raise OptionError(f"--assume {part!r}: expected {wanted}") from None


def predict(plan: Plan, machine: Machine) -> Prediction:
    """What carrying out `plan` on `machine` moves, holds and takes."""
    away = is_gpu(plan.options.device)
    changed = [step for step in plan.steps if step.action == "extrapolate"]
    on_card = {step.name: card_memory_needed(step, plan.options.svd) if away else 0 for step in changed}
    there = [step for step in changed if on_card[step.name]]
    here = [step for step in changed if not on_card[step.name]]
    room = plan.options.gpu_memory_bytes or machine.card * costs.CARD_SHARE or math.inf
    problem = too_large(there, plan.options.svd, room)
    if plan.options.gpu_memory_bytes > costs.CARD_MOST * (machine.card or math.inf):
        most = int(costs.CARD_MOST * machine.card)
        problem = f"--gpu-memory is {plan.options.gpu_memory_bytes}, expected at most {most} of card={machine.card:.0f}"
    if problem:
        raise DeviceError(f"--device {plan.options.device}: {problem}")
    cards, iterated = gpu_count(plan.options.device), _iterated(changed, plan.options.svd)
    again_read = 4 if plan.options.kernels == "torch" else 1  # times that torch's kernels move what they multiply
    blocks = [step for step in there if on_card[step.name] > room]
    read = sum(step.aligned.n_bytes for step in plan.steps) + sum(map(_base_bytes, changed))
    written = sum(map(output_bytes, plan.steps))
    busy: dict[str, float] = {}

    def add(name: str, rate: float, seconds: Callable[[], float]) -> None:
        if rate:
            busy[name] = seconds()

    add("disk", machine.disk, lambda: (read + written) / machine.disk)
    if here:
        add(
            "cores",
            machine.cores,
            lambda: sum(_core_s(step, machine, plan.options.svd) for step in here) / machine.cores,
        )
    if there:
        pair, out = sum(map(_pair_bytes, there)), sum(step.aligned.n_bytes for step in there)
        again = sum((machine.passes - 1) * _pair_bytes(step) + step.aligned.n_bytes for step in blocks)
        add("pcie", machine.pcie, lambda: max(pair + again, out) / machine.pcie / cards)
        add("gpu", machine.gpu, lambda: (2 * machine.passes * pair + 2 * out) * again_read / machine.gpu / cards)
    return Prediction(
        read_bytes=read,
        written_bytes=written,
        host_bytes=_host_bytes(changed, plan.options, machine, cards if there else 0),
        gpu_bytes=int(min(max(on_card.values(), default=0), room)),
        in_blocks=len(blocks),
        passes=machine.passes if iterated else 0.0,
        busy_s=busy,
        elapsed_s=max(busy.values()) if machine.disk and len(busy) > 1 else None,
    )


def _host_bytes(steps: Iterable[Step], options: Options, machine: Machine, cards: int) -> int:
    """As `pipeline` admits them: a job more than there are threads, each of as many small matrices as go together."""
    threads = max(options.threads or math.ceil(machine.cores) or thread_count(options), cards * costs.CARD_THREADS)
    own = costs.thread_bytes(threads) + cards * costs.PINNED_BYTES
    needed = [(memory_needed(step, options), step) for step in steps]
    jobs = [each * max(1, steps_together(step, options)) for each, step in needed]
    in_work = min(sum(each for each, _ in needed), sum(heapq.nlargest(threads + 1, jobs)))
    room = max(options.memory_bytes - own, options.memory_bytes // 4)
    return own + max(min(in_work, room), max((each for each, _ in needed), default=0))


def _iterated(steps: Iterable[Step], svd: str) -> bool:
    return svd == "randomized" and any(
        0 < step.rank < min(part.m, part.n) for step in steps if step.factors is None for part in parts_of_each(step)
    )


def _core_s(step: Step, machine: Machine, svd: str) -> float:
    """Core seconds of a tensor that is solved by iteration, or by a full SVD, or only read and written at full rank.

    Passes with more columns than at rank 6 cost as much more: the products are what takes the time.
    """
    return sum(_part_s(step, part, machine, svd) for part in parts_of_each(step))


def _part_s(step: Step, part: Part, machine: Machine, svd: str) -> float:
    """Of one part of each of its stacked matrices."""
    m, n, rank = part.m, part.n, step.rank
    low_rank, passes, exact_s = step.factors is None and 0 < rank < min(m, n), 1.0, 0.0
    if low_rank and svd == "randomized":
        passes = machine.passes * costs.block_width(m, n, rank) / costs.block_width(m, n, min(rank, 6))
    if low_rank and svd == "exact":
        exact_s = step.count * costs.exact_flops(m, n) / costs.EXACT_FLOPS
    other = OTHER_SMALL_S if costs.kept(m, n) else OTHER_S
    share = m * n / (step.m * step.n)
    return share * _pair_bytes(step) * (passes / machine.core + other) + exact_s


def _pair_bytes(step: Step) -> int:
    return step.aligned.n_bytes + _base_bytes(step)


def _base_bytes(step: Step) -> int:
    return step.base.n_bytes if step.base is not None else 0
