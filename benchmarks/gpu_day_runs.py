"""The GPU day's whole runs: a pair as large as fits, in memory and on disk, and what was busy for how much of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import disk
import pairs
import torch
from gpu_day_basis import RANK, Day, Now, NowCard, Row, Rows, require, seeded
from harness import say
from safetensors.torch import save_file
from torch import Tensor

from lox_stream import Options, extrapolate
from lox_stream.cards import Card, CudaCard, CudaLane, Event, Lane
from lox_stream.costs import CARD_SHARE, CARD_THREADS, bytes_on_card
from lox_stream.kernels import on_gpu
from lox_stream.on_card import COMPUTE_LANES, LIBRARY_BYTES, Cards, OnCard
from lox_stream.options import thread_count
from lox_stream.reader import Prefetch
from lox_stream.synthetic import hash_of, pair_of

SHM_TARGET, DISK_TARGET = 0.8, 1.1
SPARE = 1.1  # of the space, for what a run writes beside the weights
MAKING = {"/dev/shm": 1 / 4, "disk": 1 / 7}  # of the time: the runs move the bytes again, and so does the floor


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
        self.spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self.forget()

    def forget(self) -> None:
        self.spans = {"copy": [], "launch": [], "entered": []}

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


def lane_of(day: Day) -> Lane:
    return CudaLane(day.device) if day.away else Now()


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

    def busy(self) -> dict[str, float]:
        """Seconds; the two lanes that compute add up to twice the time at most."""
        into, back, *compute = self.lanes  # in the order in which on_card.py asks for them
        return {
            "in": into.seconds("copy"),
            "out": back.seconds("copy"),
            "products and updates": sum(lane.seconds("launch") for lane in compute),
            "lanes taken by the solver": sum(lane.seconds("entered") for lane in compute),
        }


@dataclass(slots=True)
class Reading:
    """Seconds in which the program's reader fetches: from the disk, for what lies in memory it leaves alone."""

    seconds: float = 0.0
    _now: int = 0  # threads that fetch
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def watched(self) -> Iterator[None]:
        fetch = Prefetch._fetch

        def timed(prefetch: Prefetch, *given: object) -> None:
            with self._busy():
                fetch(prefetch, *given)  # type: ignore[arg-type]

        with mock.patch.object(Prefetch, "_fetch", timed):
            yield

    @contextmanager
    def _busy(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            if self._now == 1:
                self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1
                if not self._now:
                    self.seconds += time.perf_counter() - self._since


@dataclass(slots=True)
class Pair:
    """A pair on its way to as many layers as fit: a shard for the rest of the model, and one for each layer."""

    folder: Path
    layers: int = 0
    n_bytes: int = 0  # of a side
    needed: int = 0  # bytes of a GPU, by the matrix that takes most
    ended_by: str = ""  # what there was no more of

    @property
    def sides(self) -> list[list[Path]]:
        return [sorted((self.folder / side).glob("*.safetensors")) for side in ("base", "aligned")]

    def make(self, day: Day, most_bytes: float, until: float) -> None:
        """Layer by layer, synced, until so many bytes a side or the time is reached."""
        weight_map: dict[str, str] = {}
        for side in ("base", "aligned"):
            (self.folder / side).mkdir()
            (self.folder / side / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
        for number in range(day.sizes.most_layers + 1):
            shapes = _shard(day, number)
            n_bytes = 2 * sum(map(math.prod, shapes.values()))
            if self.n_bytes + n_bytes > most_bytes:
                self.ended_by = "space"
            elif self.layers and time.monotonic() > until:
                self.ended_by = "time"
            if self.ended_by:
                break
            name = f"model-{number:05}.safetensors"
            self._write(day, name, shapes)
            weight_map |= dict.fromkeys(shapes, name)
            self.layers, self.n_bytes = number, self.n_bytes + n_bytes
            matrices = [shape for shape in shapes.values() if len(shape) == 2]
            self.needed = max(self.needed, *(bytes_on_card(m, n, RANK, (2, 2)) for m, n in matrices))
        index = json.dumps({"metadata": {"total_size": self.n_bytes}, "weight_map": weight_map})
        for side in ("base", "aligned"):
            (self.folder / side / "model.safetensors.index.json").write_text(index)

    def _write(self, day: Day, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        made: tuple[dict[str, Tensor], ...] = ({}, {})
        for tensor, shape in shapes.items():
            ones = torch.ones(shape, dtype=torch.bfloat16)
            both = (ones, ones) if len(shape) == 1 else pair_of(*shape, seeded(day, hash_of(0, tensor)))
            for side, weight in zip(made, both, strict=True):
                side[tensor] = weight.cpu()
        for folder, tensors in zip(("base", "aligned"), made, strict=True):
            path = self.folder / folder / name
            save_file(tensors, path, metadata={"format": "pt"})
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or the time would be that of the page cache


def _shard(day: Day, number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer; number 0 is what lies outside of them."""
    shapes = day.sizes.model(max(number, 1))
    layer = f".layers.{number - 1}."
    return {name: shape for name, shape in shapes.items() if (layer in name if number else ".layers." not in name)}


@dataclass(frozen=True, slots=True)
class Ran:
    """A run of the pair."""

    seconds: float
    busy: str
    memory: str  # of the GPU
    within: bool  # its budget


def run(day: Day, pair: Pair, name: str, gpu_memory_bytes: int = 0) -> Ran:
    """`extrapolate` in this process, from cold inputs."""
    card = TimedCard(CudaCard(0) if day.away else NowCard())
    budget = gpu_memory_bytes or int(CARD_SHARE * card.free_bytes())
    cards = Cards([OnCard(card, budget, on_gpu(day.sizes.kernels))])
    cool(pair.sides)
    options = Options(device="cuda" if day.away else "cpu")
    reading, before, disk_s = Reading(), _kept(day), disk.busy_s(pair.folder)
    with mock.patch("lox_stream.pipeline.cards_of", return_value=cards), reading.watched():
        started = time.perf_counter()
        extrapolate(pair.folder / "base", pair.folder / "aligned", pair.folder / name, options=options)
        seconds = time.perf_counter() - started
    times = {"reading": reading.seconds, **card.busy()}
    if disk_s is not None:
        times = {"disk": (disk.busy_s(pair.folder) or disk_s) - disk_s, **times}
    busy = ", ".join(f"{part} {taken / seconds:.0%}" for part, taken in times.items())
    return Ran(seconds, busy, *_peaks(day, before, budget, max(thread_count(options), CARD_THREADS)))


def _kept(day: Day) -> int:
    """Bytes that torch keeps of the card; the peaks begin anew."""
    if not day.away:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def _peaks(day: Day, before: int, budget: int, threads: int) -> tuple[str, bool]:
    """What torch reserved at most, and whether that is the budget and what CUDA's libraries may have beside it."""
    if not day.away:
        return "none", True
    allocated, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - before
    beside = threads * COMPUTE_LANES * LIBRARY_BYTES
    told = f"{allocated / 1e9:.2f} GB used, {reserved / 1e9:.2f} GB kept of {budget / 1e9:.2f} GB"
    return told, allocated <= budget + beside and reserved <= budget + beside


def whole_runs(day: Day) -> Rows:
    """`extrapolate` of a pair in memory (/dev/shm) and on disk, with what kept which part busy.

    Against the rate from host to device in memory, and on disk against the same reads and writes with nothing computed.
    """
    memory = Path("/dev/shm")
    with contextlib.ExitStack() as folders:
        for where, root in (("/dev/shm", memory if memory.is_dir() else None), ("disk", None)):
            pair = Pair(Path(folders.enter_context(tempfile.TemporaryDirectory(dir=root))))
            until = day.until if where == "disk" else time.monotonic() + day.left_s() / 2
            yield f"from {where}", partial(_row, day, pair, where, until)
            if where == "/dev/shm":
                yield f"from {where}, with the GPU memory of one matrix", partial(_held, day, pair)
            folders.close()


def _row(day: Day, pair: Pair, where: str, until: float) -> Row:
    say(f"making a pair: {where}")
    now = time.monotonic()
    pair.make(day, _most_bytes(pair.folder, where), now + MAKING[where] * (until - now))
    if not pair.layers:
        return "-", "-", "-", "left out: there is no space for a layer", "-"
    least_s = 2 * pair.n_bytes / day.rates["host_to_device"]
    if where == "disk":
        cool(pair.sides)
        started = time.perf_counter()
        disk.floor(pair.sides, pair.folder / "floor")
        least_s = time.perf_counter() - started
        shutil.rmtree(pair.folder / "floor")
    ran = [run(day, pair, "out0")]
    if until - time.monotonic() > 1.5 * ran[0].seconds:
        ran.append(run(day, pair, "out1"))
        _same(pair)
    best = min(ran, key=lambda one: one.seconds)
    if where == "disk":
        day.found("disk", f"{best.seconds / least_s:.2f}x", best.seconds <= DISK_TARGET * least_s)
        day.found("busy", best.busy)
    else:
        day.found("shm", f"{least_s / best.seconds:.0%}", least_s >= SHM_TARGET * best.seconds)
    size = f"{2 * pair.n_bytes / 1e9:.2f} GB, {pair.layers} layers"
    size += f": no more {pair.ended_by}" if pair.ended_by else ""
    return size, f"{best.seconds:.2f} s", f"{best.seconds / least_s:.2f}x of {least_s:.2f} s", best.busy, best.memory


def _held(day: Day, pair: Pair) -> Row:
    """With as much of the card's memory as the largest matrix takes: slower, perhaps, and the same bytes."""
    if not (pair.folder / "out0").is_dir():
        return "-", "-", "-", "left out: there is no pair", "-"
    ran = run(day, pair, "held", pair.needed)
    _same(pair)
    day.found("memory", ran.memory, ran.within if day.away else None)
    return "the same", f"{ran.seconds:.2f} s", "-", ran.busy, ran.memory


def _most_bytes(folder: Path, where: str) -> float:
    """Of a side: both are there with two outputs, in memory also that of a run held to little, on disk the floor's."""
    free = float(shutil.disk_usage(folder).free)
    if where == "/dev/shm":
        free = min(free, _available_bytes() / 2)  # a run and CUDA take memory, too
    return free / 5 / SPARE


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _same(pair: Pair) -> None:
    """All outputs are the same bytes."""
    for path in (pair.folder / "out0").glob("*.safetensors"):
        others = [other for other in pair.folder.glob(f"*/{path.name}") if other.parent.name not in ("base", "aligned")]
        alike = all(disk.same(a, b) for a, b in itertools.pairwise(others))
        require(alike, f"two runs of {pair.folder} differ in {path.name}: what they wrote")


def cool(sides: list[list[Path]]) -> None:
    for side in sides:
        pairs.cool(side)
