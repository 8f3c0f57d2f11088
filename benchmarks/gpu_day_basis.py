"""What the parts of the GPU day share: sizes, clocks, the deadline, figures and their targets, a card for a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from harness import WrongResult
from torch import Tensor

from lox_stream.blocks import Block
from lox_stream.card_delta import DeltaOnCard
from lox_stream.cards import Event, Lane
from lox_stream.kernels import in_order, on_gpu
from lox_stream.svd import TruncatedSVD, relative, truncated_svd
from lox_stream.synthetic import llama_shapes

RANK, ALPHA = 6, 1.25
FLOAT32 = torch.finfo(torch.float32).eps
LAYER = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))

Row = tuple[str, ...]
Work = Callable[[], Row]  # the cells beside a row's name
Rows = Iterator[tuple[str, Work]]  # a generator of them goes on whether a row was taken or left out


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is."""

    m: int
    n: int
    repeats: int
    copy_bytes: int
    candidates: int  # of the tiles of a kernel, beside the chosen one
    solved: tuple[tuple[int, int], ...]  # matrices that all solvers are given
    layer: tuple[tuple[int, int], ...]
    small: tuple[int, ...]  # sides of small eigenproblems
    step: tuple[tuple[int, int], ...]  # matrices of which a step's launches are timed
    waits: tuple[int, int]
    model: Callable[[int], dict[str, tuple[int, ...]]]  # of so many layers, of a pair that is run whole
    most_layers: int
    kernels: Literal["triton", "torch"]  # of whole runs


REAL = Sizes(
    *(8192, 28672, 20, 2 << 30, 10),
    solved=((4096, 4096), (8192, 8192), (8192, 28672), (128256, 8192)),
    layer=LAYER,
    small=(16, 32, 80, 160, 512),
    step=((1024, 8192), (8192, 28672)),
    waits=(8192, 8192),
    model=lambda layers: llama_shapes(4096, 14336, layers, 32000, 1024, tied=False),
    most_layers=1000,
    kernels="triton",
)
SMOKE = Sizes(
    *(64, 128, 1, 1 << 20, 1),
    solved=((48, 64), (64, 64)),
    layer=((32, 64), (48, 64)),
    small=(16, 32),
    step=((32, 64),),
    waits=(48, 64),
    model=lambda layers: llama_shapes(64, 96, layers, 100, 32, tied=False),
    most_layers=2,
    kernels="torch",  # those of Triton take minutes in its interpreter
)


@dataclass(slots=True)
class Figure:
    """A line of the leading table."""

    what: str
    target: str  # "-": none
    measured: str = "not measured"
    met: bool | None = None

    def row(self) -> Row:
        met = {True: "yes", False: "no", None: "not measured" if self.measured == "not measured" else "-"}[self.met]
        return self.what, self.target, self.measured, met


def figures() -> dict[str, Figure]:
    """All that a GPU day is to measure; results/PENDING.md has the same."""
    return {
        "tests": Figure("the tests, on the GPU", "all pass"),
        "delta_matmul": Figure("delta_matmul, 8192 x 28672 bf16, of a copy's bandwidth", "85 %"),
        "delta_rmatmul": Figure("delta_rmatmul, 8192 x 28672 bf16, of a copy's bandwidth", "85 %"),
        "update": Figure("lowrank_update, 8192 x 28672 bf16, of a copy's bandwidth", "85 %"),
        "others": Figure("faster than the best other solver at equal share", "3x"),
        "full": Figure("faster than a full SVD, 8192 x 8192", "100x"),
        "layer": Figure("one layer of 70B at its true shapes, times 80", "-"),
        "eigen": Figure("small eigenproblems by LAPACK on the host against the card", "not slower"),
        "graph": Figure(
            "a step's launches as a CUDA graph against plain ones", "under 1.1x faster, for it is not used"
        ),
        "waits": Figure("two lanes against one, for the host's waits", "-"),
        "shm": Figure("end to end from /dev/shm, of the host-to-device rate", "80 %"),
        "disk": Figure("end to end from disk, over the IO floor", "1.1x"),
        "memory": Figure("GPU memory of a run that is held to little", "within its budget"),
        "busy": Figure("busy: disk, copies, products", "-"),
        "day": Figure("all of this", "480 s"),
    }


class Clock:
    """Seconds of work on a device, by its own events where it has some; the median of several."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, work: Callable[[], object], *, repeats: int = 0) -> float:
        if self.repeats > 1:
            work()  # compiles, and warms up
        return statistics.median(self.once(work) for _ in range(repeats or self.repeats))

    def first(self, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What a first call gives, and its seconds: of what takes so long that a warm-up would double the day."""
        found: list[Tensor] = []
        seconds = self.once(lambda: found.append(work()))
        return found[0], seconds

    def once(self, work: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@dataclass(slots=True)
class Day:
    """The machine and the time that is left; figures as they are found."""

    device: torch.device
    sizes: Sizes
    clock: Clock
    until: float  # of the part in work, in time.monotonic()
    figures: dict[str, Figure] = field(default_factory=figures)
    rates: dict[str, float] = field(default_factory=dict)  # bytes a second: "copy", "host_to_device"

    @property
    def away(self) -> bool:
        return self.device.type == "cuda"

    def left_s(self) -> float:
        return self.until - time.monotonic()

    def found(self, name: str, measured: str, met: bool | None = None) -> None:
        self.figures[name].measured, self.figures[name].met = measured, met


def bandwidths(day: Day) -> dict[str, float]:
    """Bytes a second of a copy within the card's memory (read and written), and from pinned memory to it."""
    n_bytes = day.sizes.copy_bytes
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=day.device)
    to = torch.empty_like(source)
    pinned = torch.empty(n_bytes // 4, dtype=torch.uint8, pin_memory=day.away).fill_(7)
    return {
        "copy": 2 * n_bytes / day.clock.seconds(lambda: to.copy_(source)),
        "host_to_device": pinned.numel()
        / day.clock.seconds(lambda: to[: pinned.numel()].copy_(pinned, non_blocking=True)),
    }


def best_other(found: Mapping[str, tuple[float, float]], ours: str) -> tuple[float, str] | None:
    """How many times as long the fastest other solver takes, and which that is; None where no other is as right.

    `found` has seconds and the share of exact outputs of each. At equal share: of the others only those count that
    reach ours.
    """
    seconds, share = found[ours]
    equal = [(other_s / seconds, name) for name, (other_s, other) in found.items() if name != ours and other >= share]
    return min(equal, default=None)


def require(holds: object, what: str) -> None:
    if not holds:
        raise WrongResult(f"{what} is wrong: it has no speed")


def seeded(day: Day, seed: int) -> torch.Generator:
    """Whose tensors are made on the card, where that takes seconds less than on the host."""
    return torch.Generator(day.device).manual_seed(seed)


@dataclass(frozen=True, slots=True)
class There:
    """Weights that lie on the card, as blocks."""

    w1: Tensor
    w0: Tensor

    def walk(self, *, both: bool = True) -> Iterator[Block]:
        yield slice(0, self.w1.shape[0]), self.w1, self.w0 if both else self.w1


class Now:
    """A lane that is torch's current stream; on a CPU all is done at once. Its own event, too."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> Now:
        return self

    def wait_for(self, event: Event) -> None:
        pass

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class NowCard:
    """The CPU as a card, for the smoke form."""

    device = torch.device("cpu")

    def lane(self) -> Now:
        return Now()

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return 1 << 30

    def bound(self, n_bytes: int) -> None:
        pass

    def trim(self) -> None:
        pass

    def close(self) -> None:
        pass

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()


def solved(w1: Tensor, w0: Tensor, lane: Lane | None = None) -> TruncatedSVD:
    """By the program's solver, in the lane of whoever calls."""
    op = DeltaOnCard(w1, w0, There(w1, w0), lane or Now(), on_gpu("triton"), w1.device, in_order, rms=1e-4)
    return truncated_svd(op, RANK, generator=torch.Generator().manual_seed(0), enough=relative(5e-4))
