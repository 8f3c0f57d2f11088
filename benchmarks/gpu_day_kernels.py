"""The GPU day's sweep of the kernels' tiles, each compared with float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
from gpu_day_basis import FLOAT32, RANK, Day, Row, Rows, require, seeded
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lox_stream.kernels.gpu import delta_matmul, delta_rmatmul, lowrank_update, updates

TARGET = 0.85  # of a copy's bandwidth
SEEN = 64  # rows that are compared with float64
LANES = (16, 32, 64)
TILES = {  # rows, columns, warps: candidates at all numbers of columns
    "delta_matmul": ((64, 64, 4), (64, 128, 8), (128, 64, 8), (32, 64, 4), (64, 32, 4), (128, 128, 8)),
    "delta_rmatmul": ((32, 128, 4), (32, 64, 4), (64, 128, 8), (64, 64, 4), (16, 128, 4), (32, 128, 8)),
}
UPDATE_TILES = ((32, 128), (64, 64), (64, 128), (16, 256), (32, 256))  # rows and columns
MODULES = {"delta_matmul": delta_matmul, "delta_rmatmul": delta_rmatmul}


class Swept:
    """The weights, the other factors, and a row for each kernel at each tile."""

    def __init__(self, day: Day) -> None:
        self.day, generator = day, seeded(day, 0)
        m, n = day.sizes.m, day.sizes.n
        self.w0 = torch.randn(m, n, generator=generator, device=day.device).mul_(0.02).bfloat16()
        noise = torch.randn(m, n, generator=generator, device=day.device).mul_(1e-4)
        self.w1 = (self.w0.float() + noise).bfloat16()
        self.x, self.y = (self._factor(length, max(LANES), generator) for length in (n, m))
        self.us, self.vh = (
            self._factor(m, RANK, generator).contiguous(),
            self._factor(n, RANK, generator).T.contiguous(),
        )
        self.us *= 0.01
        self.n_bytes = 2 * self.w1.numel() * self.w1.element_size()  # two weights, or one that is read and one written
        self.exact = {  # (SEEN, LANES) float64 of each product
            "delta_matmul": (self.w1[:SEEN].double() - self.w0[:SEEN].double()) @ self.x.double(),
            "delta_rmatmul": (self.w1[:, :SEEN].double() - self.w0[:, :SEEN].double()).T @ self.y.double(),
        }
        self.best: dict[str, float] = {}  # shares of a copy, by kernel and lanes

    def _factor(self, length: int, lanes: int, generator: torch.Generator) -> Tensor:
        return torch.randn(lanes, length, generator=generator, device=self.day.device).T

    def product(self, name: str, lanes: int, tile: tuple[int, int, int]) -> Row:
        module = MODULES[name]
        factor = (self.x if name == "delta_matmul" else self.y)[:, :lanes]
        function = getattr(module, name)

        def check() -> bool:
            exact = self.exact[name][:, :lanes]
            found = function(self.w1, self.w0, factor)[:SEEN].double()
            return bool((found - exact).norm() <= 16 * FLOAT32 * exact.norm())

        tiled = mock.patch.dict(module.TILES, {lanes: tile})
        return self._row(f"{name} {lanes}", tiled, lambda: function(self.w1, self.w0, factor), check)

    def update(self, how: str, tile: tuple[int, int]) -> Row:
        key, out = (1, 2) if how == "stochastic" else None, torch.empty_like(self.w1)

        def work() -> Tensor:
            return lowrank_update.lowrank_update(self.w1, self.us, self.vh, out, key=key)

        def check() -> bool:
            work()
            exact = self.w1[:SEEN].double() + self.us[:SEEN].double() @ self.vh.double()
            places = torch.finfo(out.dtype).eps * exact.abs() * (1.01 if key else 0.51) + 1e-6
            return bool(((out[:SEEN].double() - exact).abs() <= places).all())

        tiled = mock.patch.multiple(updates, BLOCK_M=tile[0], BLOCK_N=tile[1])
        return self._row(f"lowrank_update {how}", tiled, work, check)

    def _row(
        self, name: str, tiled: AbstractContextManager[object], work: Callable[[], object], check: Callable[[], bool]
    ) -> Row:
        try:
            with tiled:
                require(check(), name)
                seconds = self.day.clock.seconds(work)
        except (RuntimeError, OutOfResources, AssertionError) as problem:  # a tile that does not go here
            return "-", "-", (str(problem).splitlines() or [type(problem).__name__])[0][:60]
        rate = self.n_bytes / seconds
        share = rate / self.day.rates["copy"]
        self.best[name] = max(share, self.best.get(name, 0.0))
        return f"{1e3 * seconds:.3f} ms", f"{rate / 1e9:.0f} GB/s", f"{share:.0%}"


def kernels(day: Day) -> Rows:
    """What the program launches comes first, then the other tiles as long as there is time."""
    swept = Swept(day)
    chosen = {(name, lanes): MODULES[name].TILES[lanes] for lanes in LANES for name in MODULES}
    block = updates.BLOCK_M, updates.BLOCK_N
    for (name, lanes), tile in chosen.items():
        yield (
            f"{name}, {lanes} columns, {tile}, chosen",
            lambda name=name, lanes=lanes, tile=tile: swept.product(name, lanes, tile),
        )
        if lanes == LANES[0]:
            _told(day, name, swept.best.get(f"{name} {lanes}"))
    for how in ("nearest", "stochastic"):
        yield f"lowrank_update, rank {RANK}, {how}, {block}, chosen", lambda how=how: swept.update(how, block)
        if how == "nearest":
            _told(day, "update", swept.best.get("lowrank_update nearest"))
    for name, lanes, tile in _others(day, chosen):
        yield (
            f"{name}, {lanes} columns, {tile}",
            lambda name=name, lanes=lanes, tile=tile: swept.product(name, lanes, tile),
        )
    for tile in [tile for tile in UPDATE_TILES if tile != block][: day.sizes.candidates]:
        yield f"lowrank_update, rank {RANK}, nearest, {tile}", lambda tile=tile: swept.update("nearest", tile)


def _others(
    day: Day, chosen: dict[tuple[str, int], tuple[int, int, int]]
) -> Iterator[tuple[str, int, tuple[int, int, int]]]:
    for (name, lanes), used in chosen.items():
        for tile in [tile for tile in TILES[name] if tile != used][: day.sizes.candidates]:
            yield name, lanes, tile


def _told(day: Day, figure: str, share: float | None) -> None:
    if share is not None:
        day.found(figure, f"{share:.0%}", share >= TARGET)
