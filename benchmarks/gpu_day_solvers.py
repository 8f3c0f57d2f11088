"""The GPU day's solvers: ours against what torch has, small problems on the host or the card, waits, a layer of 70B."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from gpu_day_basis import ALPHA, RANK, Day, Now, Row, Rows, best_other, seeded, solved
from gpu_day_runs import TimedLane, lane_of
from torch import Tensor

from lox_stream.kernels.gpu import delta_matmul, delta_rmatmul, lowrank_update
from lox_stream.synthetic import pair_of

OURS, FULL, LOWRANK = "lox-stream", "torch.linalg.svd", "svd_lowrank"
OTHERS_TARGET, FULL_TARGET, FULL_SIDE = 3.0, 100.0, 8192
LONGEST_S = 60.0  # that one solver may take, once
NITER = (2, 4, 8, 12)
LAYERS = 80
GRAPH_PAYS = 1.1


class Solvers:
    """Solvers on one planted difference after another; what takes too long by its last time is left out."""

    def __init__(self, day: Day) -> None:
        self.day = day
        self.taken: dict[str, tuple[float, float]] = {}  # seconds, and the work m * n * min(m, n) that they are for
        self.ratios: list[str] = []
        self.least = math.inf

    def rows(self, m: int, n: int) -> Rows:
        """A row for each solver, and one that compares them."""
        made: list[tuple[Tensor, Tensor, Tensor]] = []
        found: dict[str, tuple[float, float]] = {}  # seconds, and the share of outputs with the exact bits

        def work(name: str) -> Row:
            expected_s = self._expected_s(name, m, n)
            if expected_s > min(LONGEST_S, self.day.left_s() / 2):
                return "-", "-", f"left out: would take {expected_s:.0f} s"
            if not made:
                w0, w1 = pair_of(m, n, seeded(self.day, 0))
                made.append((w1, w0, _exact(w1, w0)))
            return self._solver(name, *made[0], found)

        for name in self._names(m, n):
            yield f"{name}, {m} x {n}", partial(work, name)
        yield f"{OURS}, {m} x {n}, against the best other", lambda: self._compared(m, n, found)

    def _names(self, m: int, n: int) -> list[str]:
        drivers = ("gesvdj", "gesvda", "gesvd") if self.day.away else ("default",)
        full = [f"{FULL}, {driver}" for driver in drivers] if m == n else []
        full.sort(key=lambda name: self.taken.get(name, (math.inf, 1.0))[0])  # the fastest there is time for
        return [OURS, *(f"{LOWRANK}, niter {niter}" for niter in NITER), *full]

    def _expected_s(self, name: str, m: int, n: int) -> float:
        seconds, effort = self.taken.get(name, (0.0, 1.0))
        return seconds * (m * n * min(m, n)) / effort if name.startswith(FULL) else 0.0

    def _solver(self, name: str, w1: Tensor, w0: Tensor, exact: Tensor, found: dict[str, tuple[float, float]]) -> Row:
        give = partial(_rank_part, name, w1, w0)
        clock, effort = self.day.clock, w1.numel() * min(w1.shape)
        try:
            part, first_s = clock.first(give)
            error = float((part.double() - exact).norm() / exact.norm())
            outputs = [(w1.double() + ALPHA * one.double()).bfloat16() for one in (part, exact)]
            share = float((outputs[0] == outputs[1]).double().mean())
            del part, outputs
            seconds = first_s if name.startswith(FULL) or clock.repeats == 1 else clock.seconds(give, repeats=5)
        except RuntimeError as problem:  # of a library: the others have their figures all the same
            self.taken[name] = math.inf, effort
            return "-", "-", str(problem).splitlines()[0][:60]
        self.taken[name], found[name] = (seconds, effort), (seconds, share)
        return f"{1e3 * seconds:.2f} ms", f"{error:.1e}", f"{share:.4%}"

    def _compared(self, m: int, n: int, found: dict[str, tuple[float, float]]) -> Row:
        """At equal share: only those count of whose outputs as many are exact as of ours."""
        if OURS not in found:
            return "-", "-", "left out: ours was not measured"
        ours_s, share = found[OURS]
        full = [seconds for name, (seconds, _) in found.items() if name.startswith(FULL)]
        if full and m == n == max(side for side, other in self.day.sizes.solved if side == other):
            self.day.found("full", f"{min(full) / ours_s:.0f}x", m == FULL_SIDE and min(full) >= FULL_TARGET * ours_s)
        best = best_other(found, OURS)
        if best is None:
            return "-", "-", f"no other has {share:.4%} of the outputs exact"
        times, name = best
        self.least = min(self.least, times)
        self.ratios.append(f"{times:.1f}x at {m} x {n}")
        self.day.found("others", ", ".join(self.ratios), self.least >= OTHERS_TARGET)
        return f"{times:.1f}x faster", "-", f"than {name}, at {share:.4%}"


def _exact(w1: Tensor, w0: Tensor) -> Tensor:
    """The rank-k part in float64, by all eigenvectors of a Gram matrix: for the leading ones that is exact enough."""
    delta = w1.double() - w0.double()
    turned = delta.shape[0] < delta.shape[1]
    tall = delta.T if turned else delta
    _, vectors = torch.linalg.eigh(tall.T @ tall)
    leading = vectors[:, -RANK:]
    part = (tall @ leading) @ leading.T
    return part.T if turned else part


def _rank_part(name: str, w1: Tensor, w0: Tensor) -> Tensor:
    """What a solver gives from the weights; forming the difference counts where it is needed."""
    if name == OURS:
        found = solved(w1, w0)
        return (found.u * found.s.to(found.u.device)) @ found.vh
    delta = w1.float() - w0.float()
    if name.startswith(LOWRANK):
        u, s, v = torch.svd_lowrank(delta, q=RANK + 10, niter=int(name.rpartition(" ")[2]))
        return (u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T
    driver = name.rpartition(" ")[2]
    u, s, vh = torch.linalg.svd(delta, full_matrices=False, driver=None if driver == "default" else driver)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def solvers(day: Day) -> Rows:
    """All solvers at one shape after the other."""
    compared = Solvers(day)
    for m, n in day.sizes.solved:
        yield from compared.rows(m, n)


def layer(day: Day) -> Rows:
    """One layer of 70B at its true shapes, solved and updated in the card's memory, and eighty times that."""
    taken: list[float] = []

    def work(m: int, n: int) -> Row:
        w0, w1 = pair_of(m, n, seeded(day, m + n))
        out = torch.empty_like(w1)

        def update() -> None:
            found = solved(w1, w0)
            us = (found.u * (ALPHA * found.s.to(found.u.device))).contiguous()
            lowrank_update.lowrank_update(w1, us, found.vh.contiguous(), out)

        taken.append(day.clock.seconds(update, repeats=min(day.clock.repeats, 5)))
        return (f"{1e3 * taken[-1]:.1f} ms",)

    for m, n in day.sizes.layer:
        yield f"{m} x {n}", partial(work, m, n)
    if len(taken) == len(day.sizes.layer):
        day.found("layer", f"{LAYERS * sum(taken):.2f} s")
        yield "the layer", lambda: (f"{1e3 * sum(taken):.1f} ms",)
        yield f"{LAYERS} layers", lambda: (f"{LAYERS * sum(taken):.2f} s",)


def small(day: Day) -> Rows:
    """What is small: eigenproblems of Gram matrices here or there; a step's launches, plain or as a graph; waits."""
    ratios: dict[int, float] = {}

    def eigen(side: int) -> Row:
        rows = torch.randn(side, 4 * side, generator=seeded(day, side), device=day.device, dtype=torch.float64)
        gram = rows @ rows.T

        def host() -> Tensor:
            return torch.linalg.eigh(gram.cpu())[1].to(day.device)

        host_s, card_s = day.clock.seconds(host), day.clock.seconds(lambda: torch.linalg.eigh(gram))
        ratios[side] = card_s / host_s
        return f"{1e3 * host_s:.3f} ms", f"{1e3 * card_s:.3f} ms", f"the host is {ratios[side]:.2g}x as fast"

    for side in day.sizes.small:
        yield f"eigenvectors of {side} x {side}: host, card", partial(eigen, side)
        told = ", ".join(f"{ratio:.2g}x as fast at {one}" for one, ratio in ratios.items())
        if told:
            day.found("eigen", told, min(ratios.values()) >= 1)
    graphs: dict[str, float] = {}
    for m, n in day.sizes.step:
        yield f"a step's launches, {m} x {n}: plain, as a graph", partial(_step, day, m, n, graphs)
        if graphs:
            told = ", ".join(f"{ratio:.2f}x as fast at {shape}" for shape, ratio in graphs.items())
            day.found("graph", told, max(graphs.values()) < GRAPH_PAYS)
    m, n = day.sizes.waits
    yield f"two matrices of {m} x {n}: in one lane, in two", partial(_waits, day, m, n)


def _step(day: Day, m: int, n: int, ratios: dict[str, float]) -> Row:
    """Both products and what lies between them on the card; the small matrices are the host's."""
    w0, w1 = pair_of(m, n, seeded(day, 0))
    x = torch.randn(16, n, generator=seeded(day, 1), device=day.device).T
    basis = torch.randn(64, n, generator=seeded(day, 2), device=day.device)

    def step() -> Tensor:
        image = delta_matmul.delta_matmul(w1, w0, x)
        rows = delta_rmatmul.delta_rmatmul(w1, w0, image).T
        wide = torch.addmm(rows, rows @ basis.T, basis, alpha=-1).double()
        return wide @ wide.T

    plain_s = day.clock.seconds(step)
    graph_s = day.clock.seconds(_captured(step) if day.away else step)
    ratios[f"{m} x {n}"] = plain_s / graph_s
    return f"{1e3 * plain_s:.3f} ms", f"{1e3 * graph_s:.3f} ms", f"the graph is {plain_s / graph_s:.2f}x as fast"


def _captured(step: Callable[[], Tensor]) -> Callable[[], None]:
    """Work that was launched before, so that all is compiled, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _waits(day: Day, m: int, n: int) -> Row:
    """Two matrices one after the other, and side by side in two lanes as the program has them.

    While the host looks at the small matrices of one, the card can multiply for the other.
    """
    pairs = [pair_of(m, n, seeded(day, number)) for number in range(2)]
    lanes = [TimedLane(lane_of(day)) for _ in range(2)]
    Now().wait()  # the lanes do not wait for what was made in another

    def solve(number: int, lane: TimedLane) -> None:
        w0, w1 = pairs[number]
        with lane.lane.entered():
            solved(w1, w0, lane)
            lane.record().wait()

    def one() -> None:
        for number in range(2):
            solve(number, lanes[0])

    def two() -> None:
        with ThreadPoolExecutor(2 if day.away else 1) as threads:  # Triton's interpreter is for one thread
            list(threads.map(solve, range(2), lanes))

    def seconds(work: Callable[[], None]) -> float:
        day.clock.seconds(work, repeats=1)  # compiles, and warms up
        for lane in lanes:
            lane.forget()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    one_s = seconds(one)
    products = lanes[0].seconds("launch") / one_s
    two_s = seconds(two)
    day.found("waits", f"{one_s / two_s:.2f}x as fast; products take {products:.0%} of the time in one lane")
    return (
        f"{1e3 * one_s:.1f} ms",
        f"{1e3 * two_s:.1f} ms",
        f"{one_s / two_s:.2f}x; products {products:.0%} of one lane",
    )
