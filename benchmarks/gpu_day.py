#!/usr/bin/env python3
"""What a GPU does with the kernels, the solver and a whole run; `gpu_day.sh` calls it.

    python benchmarks/gpu_day.py --results build/gpu/gpu.md     on a CUDA GPU, some five minutes
    python benchmarks/gpu_day.py --smoke                        on a CPU, tiny: that it works; its times mean nothing

Every kernel is compared with float64 before it is timed: a wrong result has no speed. Bandwidth is that of the bytes
which a kernel has to move, against a copy within the card's memory in the same run. In the smoke form the kernels are
interpreted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

if "--smoke" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import disk
import pairs
from harness import Table, WrongResult, finish, say
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lox_stream import Options, extrapolate
from lox_stream.blocks import Block
from lox_stream.card_delta import DeltaOnCard
from lox_stream.cards import Card, CudaCard, Event, Lane
from lox_stream.kernels import in_order, on_gpu
from lox_stream.kernels.gpu import delta_matmul, delta_rmatmul, lowrank_update
from lox_stream.on_card import Cards, OnCard
from lox_stream.svd import TruncatedSVD, relative, truncated_svd
from lox_stream.synthetic import llama_shapes, pair_of, write_pair

RANK, LANES, ALPHA = 6, 16, 1.25
TARGET = 0.85  # of the copy's bandwidth
TILES = {  # rows, columns, warps: candidates for delta_matmul and delta_rmatmul
    "delta_matmul": ((64, 64, 4), (64, 128, 8), (128, 64, 8), (32, 64, 4), (64, 32, 4)),
    "delta_rmatmul": ((32, 128, 4), (32, 64, 4), (64, 128, 8), (64, 64, 4), (16, 128, 4)),
}
LAYER = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
SMOKE_LAYER = ((64, 64), (48, 96))
LAYERS = 80
LONGEST_S = 60.0  # that one solver may take, once
FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is."""

    m: int
    n: int
    repeats: int
    copy_bytes: int
    solved: tuple[int, ...]  # sides of the matrices that all solvers are given
    layer: tuple[tuple[int, int], ...]
    pair: dict[str, tuple[int, ...]]


REAL = Sizes(8192, 28672, 20, 2 << 30, (4096, 8192), LAYER, llama_shapes(4096, 14336, 8, 32000, 1024, tied=False))
SMOKE = Sizes(96, 160, 1, 1 << 20, (96, 128), SMOKE_LAYER, llama_shapes(128, 160, 2, 300, 48, tied=False))


class Clock:
    """Seconds of work on a device, by its own events where it has some; the median of several."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, work: Callable[[], object], *, repeats: int = 0) -> float:
        work()  # compiles, and warms up
        return statistics.median(self._once(work) for _ in range(repeats or self.repeats))

    def first(self, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What a first call gives, and its seconds: of what takes so long that a warm-up would double the day."""
        found: list[Tensor] = []
        seconds = self._once(lambda: found.append(work()))
        return found[0], seconds

    def _once(self, work: Callable[[], object]) -> float:
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


def bandwidths(clock: Clock, sizes: Sizes) -> dict[str, float]:
    """Bytes a second of a copy within the card's memory (read and written), and from pinned memory to it."""
    source = torch.randint(0, 255, (sizes.copy_bytes,), dtype=torch.uint8, device=clock.device)
    to = torch.empty_like(source)
    pinned = torch.empty(sizes.copy_bytes // 4, dtype=torch.uint8, pin_memory=clock.device.type == "cuda").fill_(7)
    return {
        "copy": 2 * sizes.copy_bytes / clock.seconds(lambda: to.copy_(source)),
        "host_to_device": pinned.numel() / clock.seconds(lambda: to[: pinned.numel()].copy_(pinned, non_blocking=True)),
    }


def kernels(clock: Clock, sizes: Sizes, copy_rate: float) -> Iterator[tuple[str, ...]]:
    """A row for each kernel at each candidate of its tiles."""
    generator = torch.Generator().manual_seed(0)
    w0, w1 = (weight.to(clock.device) for weight in _weights(sizes.m, sizes.n, generator))
    x, y = (torch.randn(LANES, length, generator=generator).to(clock.device).T for length in (sizes.n, sizes.m))
    delta = (w1[:64].double() - w0[:64].double(), w1[:, :64].double() - w0[:, :64].double())
    moved = 2 * w1.numel() * w1.element_size()
    products = (
        ("delta_matmul", delta_matmul, delta_matmul.delta_matmul, x, slice(0, 64), delta[0] @ x.double()),
        ("delta_rmatmul", delta_rmatmul, delta_rmatmul.delta_rmatmul, y, slice(0, 64), delta[1].T @ y.double()),
    )
    for name, module, function, factor, seen, exact in products:
        chosen = module.TILES[LANES]
        for tile in TILES[name]:
            module.TILES[LANES] = tile
            try:
                found = function(w1, w0, factor)[seen].double()
                _require((found - exact).norm() <= 16 * FLOAT32 * exact.norm(), f"{name} {tile}")
                seconds = clock.seconds(lambda: function(w1, w0, factor))  # noqa: B023
                yield _row(f"{name} {tile}" + " (chosen)" * (tile == chosen), seconds, moved, copy_rate)
            except (RuntimeError, OutOfResources) as problem:  # a tile that this processor cannot hold
                yield f"{name} {tile}", "-", "-", str(problem).splitlines()[0][:60]
            finally:
                module.TILES[LANES] = chosen
    us, vh = (torch.randn(*shape, generator=generator).mul_(0.01).to(clock.device) for shape in _factors(sizes))
    out = torch.empty_like(w1)
    for how, key in (("nearest", None), ("stochastic", (1, 2))):
        lowrank_update.lowrank_update(w1, us, vh, out, key=key)
        exact = w1[:64].double() + us[:64].double() @ vh.double()
        places = torch.finfo(w1.dtype).eps * exact.abs() * (1.01 if key else 0.51) + 1e-6
        _require(bool(((out[:64].double() - exact).abs() <= places).all()), f"lowrank_update {how}")
        seconds = clock.seconds(lambda: lowrank_update.lowrank_update(w1, us, vh, out, key=key))  # noqa: B023
        yield _row(f"lowrank_update, rank {RANK}, {how}", seconds, moved, copy_rate)


def _factors(sizes: Sizes) -> tuple[tuple[int, int], tuple[int, int]]:
    return (sizes.m, RANK), (RANK, sizes.n)


def _weights(m: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    w0 = torch.randn(m, n, generator=generator).mul_(0.02)
    return w0.bfloat16(), (w0 + 1e-4 * torch.randn(m, n, generator=generator)).bfloat16()


def _row(name: str, seconds: float, n_bytes: int, copy_rate: float) -> tuple[str, ...]:
    rate = n_bytes / seconds
    return name, f"{1e3 * seconds:.3f} ms", f"{rate / 1e9:.0f} GB/s", f"{rate / copy_rate:.0%}"


def solvers(clock: Clock, sizes: Sizes) -> Iterator[tuple[str, ...]]:
    """Ours against what torch has, on planted differences; what would take over LONGEST_S by its last time is left out.

    The error is that of the rank-k part, the share that of bf16 outputs with the bits of the exact result.
    """
    taken: dict[str, float] = {}
    for side, before in zip(sizes.solved, (0, *sizes.solved), strict=False):
        w0, w1 = (weight.to(clock.device) for weight in pair_of(side, side, torch.Generator().manual_seed(0)))
        exact = _exact(w1, w0)
        expected = (w1.double() + ALPHA * exact).bfloat16()
        for name, work in _contenders(w1, w0).items():
            what = f"{name}, {side} x {side}"
            if before and taken[name] * (side / before) ** 3 > LONGEST_S:
                yield what, "-", f"would take over {LONGEST_S} s", ""
                continue
            say(what)
            try:
                found, first_s = clock.first(work)
                error = float((found.double() - exact).norm() / exact.norm())
                share = float(((w1.double() + ALPHA * found.double()).bfloat16() == expected).double().mean())
                del found
                taken[name] = seconds = first_s if name.startswith("torch.linalg") else clock.seconds(work)
            except RuntimeError as problem:  # of a library: the others have their figures all the same
                taken[name] = math.inf
                yield what, "-", str(problem).splitlines()[0][:60], ""
                continue
            yield what, f"{1e3 * seconds:.2f} ms", f"{error:.1e}", f"{share:.4%}"


def _exact(w1: Tensor, w0: Tensor) -> Tensor:
    """The rank-k part in float64, by all eigenvectors of the Gram matrix: for the leading ones that is exact enough."""
    delta = w1.double() - w0.double()
    _, vectors = torch.linalg.eigh(delta.T @ delta)
    leading = vectors[:, -RANK:]
    return (delta @ leading) @ leading.T


def _contenders(w1: Tensor, w0: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each gives the rank-k part from the weights; forming the difference counts where it is needed."""

    def full(driver: str | None) -> Tensor:
        u, s, vh = torch.linalg.svd(w1.float() - w0.float(), full_matrices=False, driver=driver)
        return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]

    def lowrank(niter: int) -> Tensor:
        u, s, v = torch.svd_lowrank(w1.float() - w0.float(), q=RANK + 10, niter=niter)
        return (u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T

    def ours() -> Tensor:
        found = _solved(w1, w0)
        return (found.u * found.s.to(found.u.device)) @ found.vh

    drivers = ("gesvd", "gesvdj", "gesvda") if w1.device.type == "cuda" else (None,)
    return {
        **{f"torch.linalg.svd, {driver}": partial(full, driver) for driver in drivers},
        **{f"svd_lowrank, niter {niter}": partial(lowrank, niter) for niter in (2, 4, 8, 12)},
        "lox-stream": ours,
    }


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


def _solved(w1: Tensor, w0: Tensor) -> TruncatedSVD:
    generator = torch.Generator().manual_seed(0)
    op = DeltaOnCard(w1, w0, There(w1, w0), Now(), on_gpu("triton"), w1.device, in_order, rms=1e-4)
    return truncated_svd(op, RANK, generator=generator, enough=relative(5e-4))


def layer(clock: Clock, sizes: Sizes) -> Iterator[tuple[str, ...]]:
    """One layer of 70B at its true shapes, solved and updated in the card's memory, and eighty times that."""
    total = 0.0
    for m, n in sizes.layer:
        w0, w1 = (weight.to(clock.device) for weight in _weights(m, n, torch.Generator().manual_seed(m + n)))
        spike = torch.linspace(3, 1, 8, device=clock.device)
        left, right = (torch.randn(length, 8, device=clock.device) for length in (m, n))
        w1 = (w1.float() + 1e-4 * (left * spike) @ right.T).bfloat16()
        out = torch.empty_like(w1)

        def work(w1: Tensor = w1, w0: Tensor = w0, out: Tensor = out) -> None:
            found = _solved(w1, w0)
            us = (found.u * (ALPHA * found.s.to(found.u.device))).contiguous()
            lowrank_update.lowrank_update(w1, us, found.vh.contiguous(), out)

        seconds = clock.seconds(work, repeats=min(clock.repeats, 5))
        total += seconds
        yield f"{m} x {n}", f"{1e3 * seconds:.1f} ms"
    yield "the layer", f"{1e3 * total:.1f} ms"
    yield f"{LAYERS} layers", f"{LAYERS * total:.2f} s"


class Mark:
    """A moment in a lane."""

    def __init__(self, lane: Lane) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        self._at = 0.0
        lane.launch(self._take)

    def _take(self) -> None:
        self._at = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def until(self, other: Mark) -> float:
        """Seconds, once both are over."""
        if self._event is None or other._event is None:
            return other._at - self._at
        return self._event.elapsed_time(other._event) / 1000


class TimedLane:
    """A lane that marks when its copies and kernels begin and end, and when it is entered and left."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._lock = threading.Lock()  # a copy's marks enclose it and nothing of another thread's
        self.spans: dict[str, list[tuple[Mark, Mark]]] = {"copy": [], "launch": [], "entered": []}

    def copy(self, to: Tensor, source: Tensor) -> None:
        with self._lock, self._span("copy"):
            self.lane.copy(to, source)

    def launch(self, work: Callable[[], None]) -> None:
        with self._lock, self._span("launch"):
            self.lane.launch(work)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._span("entered"), self.lane.entered():
            yield

    def record(self) -> Event:
        return self.lane.record()

    def wait_for(self, event: Event) -> None:
        with self._lock:
            self.lane.wait_for(event)

    @contextmanager
    def _span(self, kind: str) -> Iterator[None]:
        begin = Mark(self.lane)
        yield
        self.spans[kind].append((begin, Mark(self.lane)))

    def seconds(self, kind: str) -> float:
        return sum(begin.until(end) for begin, end in self.spans[kind])


class TimedCard:
    """A card whose lanes are timed."""

    def __init__(self, card: Card) -> None:
        self.card, self.device = card, card.device
        self.lanes: list[TimedLane] = []
        self.pinned, self.free_bytes, self.entered = card.pinned, card.free_bytes, card.entered
        self.bound, self.trim, self.close = card.bound, card.trim, card.close

    def lane(self) -> TimedLane:
        self.lanes.append(TimedLane(self.card.lane()))
        return self.lanes[-1]

    def busy(self, elapsed_s: float) -> str:
        """Shares of a time; the two lanes that compute add up to 200 % at most."""
        into, back, *compute = self.lanes  # in the order in which on_card.py asks for them
        taken = {
            "in": into.seconds("copy"),
            "out": back.seconds("copy"),
            "products and updates": sum(lane.seconds("launch") for lane in compute),
            "lanes taken by the solver": sum(lane.seconds("entered") for lane in compute),
        }
        return ", ".join(f"{name} {seconds / elapsed_s:.0%}" for name, seconds in taken.items())


def whole_runs(clock: Clock, sizes: Sizes, rate: float) -> Iterator[tuple[str, ...]]:
    """`extrapolate` of a pair in memory (/dev/shm) and on disk, twice each, with what kept which part busy.

    Against the rate from host to device in memory, and on disk against the same reads and writes with nothing computed.
    """
    memory = Path("/dev/shm")
    n_bytes = 2 * sum(math.prod(shape) for shape in sizes.pair.values())  # of a side, in bf16
    with contextlib.ExitStack() as folders:
        made: Path | None = None
        for where, root in (("disk", None), ("/dev/shm", memory if memory.is_dir() else None)):
            if shutil.disk_usage(root or tempfile.gettempdir()).free < 5 * n_bytes:  # two inputs, three outputs
                yield f"from {where}", "-", f"{5 * n_bytes / 1e9:.1f} GB are not free there", ""
                continue
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory(dir=root)))
            if made is None:
                say("making a pair")
                write_pair(folder, sizes.pair)
                made = folder
            else:
                for side in ("base", "aligned"):
                    shutil.copytree(made / side, folder / side)
            sides = [sorted((folder / side).glob("*.safetensors")) for side in ("base", "aligned")]
            least = 2 * n_bytes / rate
            if where == "disk":
                _cool(sides)
                least = _seconds(partial(disk.floor, sides, folder / "floor"))
            ran = [_run(clock, folder, number, sides) for number in range(2)]
            same = itertools.pairwise(sorted(folder.glob("out*/model.safetensors")))
            _require(all(a.read_bytes() == b.read_bytes() for a, b in same), f"two runs from {where} differ")
            seconds, busy = min(ran)
            yield f"from {where}, {2 * n_bytes / 1e9:.2f} GB read", f"{seconds:.2f} s", f"{seconds / least:.2f}x", busy


def _run(clock: Clock, folder: Path, number: int, sides: list[list[Path]]) -> tuple[float, str]:
    """Seconds of a run from cold inputs, and what was busy for which share of them."""
    away = clock.device.type == "cuda"
    card = TimedCard(CudaCard(0) if away else NowCard())
    cards = Cards([OnCard(card, int(0.8 * card.free_bytes()), on_gpu("triton"))])
    _cool(sides)
    with mock.patch("lox_stream.pipeline.cards_of", return_value=cards):
        options = Options(device="cuda" if away else "cpu")
        work = partial(extrapolate, folder / "base", folder / "aligned", folder / f"out{number}", options=options)
        seconds = _seconds(work)
    return seconds, card.busy(seconds)


def _cool(sides: list[list[Path]]) -> None:
    for side in sides:
        pairs.cool(side)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _require(holds: object, what: str) -> None:
    if not holds:
        raise WrongResult(f"{what} is wrong: it has no speed")


def _parts(
    clock: Clock, sizes: Sizes, name: str, rates: dict[str, float]
) -> Iterator[tuple[str, tuple[str, ...], Iterator[tuple[str, ...]], tuple[str, ...]]]:
    """Each table: its title, heads, rows as they are taken, and notes."""
    yield (
        f"Kernels on {name}, {sizes.m} x {sizes.n} bf16, {LANES} columns",
        ("kernel and tile", "time", "bytes it has to move", "of a copy"),
        kernels(clock, sizes, rates["copy"]),
        (f"A copy within the card's memory: {rates['copy'] / 1e9:.0f} GB/s. Target {TARGET:.0%}.",),
    )
    yield (
        "Solvers",
        ("solver", "time", "error of the rank-k part", "outputs with the exact bits"),
        solvers(clock, sizes),
        (),
    )
    yield "A layer of 70B", ("matrix", "solved and updated"), layer(clock, sizes), ()
    yield (
        "Whole runs",
        ("run", "time", "over the least", "busy"),
        whole_runs(clock, sizes, rates["host_to_device"]),
        (
            f"The least from /dev/shm is the inputs' way to the card at {rates['host_to_device'] / 1e9:.1f} GB/s, "
            "target 1.25x; from disk the same reads and writes with nothing computed, target 1.1x.",
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA GPU, expected one. Try the script with --smoke")
    sizes = SMOKE if args.smoke else REAL
    if args.smoke:  # all matrices go on the card
        mock.patch("lox_stream.costs.kept", return_value=False).start()
        mock.patch("lox_stream.on_card.COMPUTE_LANES", 1).start()  # Triton's interpreter is for one thread
    clock = Clock(torch.device("cpu" if args.smoke else "cuda"), sizes.repeats)
    name = "the interpreter" if args.smoke else torch.cuda.get_device_name()
    rates = bandwidths(clock, sizes)
    tables: list[Table] = []
    wrong = ""
    for title, heads, rows, notes in _parts(clock, sizes, name, rates):
        taken: list[tuple[str, ...]] = []
        try:
            taken.extend(rows)
        except (WrongResult, RuntimeError, OSError) as problem:  # the other tables are worth having
            wrong = f"{title}: {problem}"
            say(wrong)
        tables.append(Table(title, heads, tuple(taken), notes))
    figures = {table.title: [list(row) for row in table.rows] for table in tables}
    finish("gpu_day", tables, {"gpu": name, "rates": rates, "wrong": wrong, "tables": figures}, args.results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
