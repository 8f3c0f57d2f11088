#!/usr/bin/env python3
"""The kernels one by one, on one thread and on all: forming tiles, both products, the update with either rounding.

    python benchmarks/bench_kernels.py          4096 x 4096 and 576 x 576 bf16, 16 columns, rank 6; under a minute
    python benchmarks/bench_kernels.py --smoke  a small matrix, one repetition

Each result is compared with a float64 reference before any time is printed; a wrong one ends with exit code 1. The
peak is a float32 sum over a buffer as large as the pair, taken in the same turns: the small pair lies in a cache.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness import Table, Timing, WrongResult, alternate, cores, finish, parsed, say
from oracle import rounded_once, same_bits, ulp
from torch import Tensor

from lox_stream.kernels import cpu, delta_matmul, delta_normal, delta_rmatmul, key_of, lowrank_update
from lox_stream.kernels.cpu import Run
from lox_stream.synthetic import pair_of
from lox_stream.workers import Workers

COLUMNS, RANK = 16, 6
SIZES = ((4096, 4096), (576, 576))
FLOAT32_EPS = torch.finfo(torch.float32).eps
FLIPS = 2e-4  # share of elements that float32 sums may round to the other neighbour
SIGMAS = 6.0  # of the mean of many roundings that are each unbiased
KEY = key_of(0, "bench_kernels")


@dataclass(frozen=True, slots=True)
class Data:
    """A pair (m, n) bf16 with what it is multiplied by, and an update of the size of delta."""

    w1: Tensor
    w0: Tensor
    x: Tensor  # (n, COLUMNS)
    y: Tensor  # (m, COLUMNS)
    us: Tensor  # (m, RANK)
    vh: Tensor  # (RANK, n)


def data_of(m: int, n: int) -> Data:
    generator = torch.Generator().manual_seed(m + n)
    spectrum = torch.ones(min(m, n, 64))  # the kernels do not care, and 4096 values take half a minute
    w0, w1 = pair_of(m, n, generator, spectrum=spectrum)
    x, y = torch.randn(n, COLUMNS, generator=generator), torch.randn(m, COLUMNS, generator=generator)
    us, vh = torch.randn(m, RANK, generator=generator) * 3e-5, torch.randn(RANK, n, generator=generator)
    return Data(w1, w0, x, y, us, vh)


def bands(m: int, n: int) -> tuple[slice, ...]:
    """The row tiles of an update."""
    rows = max(1, min(m, cpu.TILE_ELEMENTS // n))
    return tuple(slice(top, min(top + rows, m)) for top in range(0, m, rows))


def form(data: Data, run: Run, out: Tensor | None = None) -> None:
    """Every tile of delta in float32, kept in `out` if it is given."""
    tiles = bands(*data.w1.shape)

    def task(i: int) -> None:
        tile = cpu.difference(data.w1[tiles[i]], data.w0[tiles[i]])
        if out is not None:
            out[tiles[i]] = tile

    run(task, len(tiles))


def update(data: Data, run: Run, key: tuple[int, int] | None, out: Tensor | None = None) -> float:
    """Every tile of the output into a reused buffer, as in a run, kept in `out` if it is given; what was retained."""
    tiles = bands(*data.w1.shape)
    kept = [cpu.Retained(0.0, 0.0)] * len(tiles)

    def task(i: int) -> None:
        band = data.w1[tiles[i]]
        to = cpu.scratch(3, band.shape, band.dtype) if out is None else out[tiles[i]]
        first = tiles[i].start * band.shape[1]
        kept[i] = lowrank_update(band, data.us[tiles[i]], data.vh, to, key=key, first=first)

    run(task, len(tiles))
    dot, square = sum(part.dot for part in kept), sum(part.square for part in kept)
    return dot / square


def read(buffers: Tensor, run: Run) -> None:
    """The least that a pass over memory costs."""

    def task(i: int) -> None:
        buffers[i].sum()

    run(task, len(buffers))


def check(data: Data) -> None:
    """Compare each kernel with float64. Raises WrongResult."""
    w1, delta = data.w1.double(), data.w1.double() - data.w0.double()
    formed = torch.empty(delta.shape)
    form(data, cpu.in_order, formed)
    _require(torch.equal(formed.double(), rounded_once(delta, torch.float32).double()), "forming tiles")
    _check_product("delta_matmul", delta_matmul(data.w1, data.w0, data.x), delta, data.x)
    _check_product("delta_rmatmul", delta_rmatmul(data.w1, data.w0, data.y), delta.T, data.y)
    image, back = delta_normal(data.w1, data.w0, data.x)
    _check_product("delta_normal", image, delta, data.x)
    _check_product("delta_normal", back, delta.T, image)
    change = data.us.double() @ data.vh.double()
    exact = w1 + change
    for name, key in (("nearest", None), ("stochastic", KEY)):
        out = torch.empty_like(data.w1)
        retained = update(data, cpu.in_order, key, out)
        (_check_nearest if key is None else _check_stochastic)(out, exact)
        truth = float(((out.double() - w1) * change).sum() / change.square().sum())
        _require(abs(retained - truth) < 1e-4, f"retention of the {name} update, {retained} and not {truth}")


def _check_product(name: str, product: Tensor, matrix: Tensor, other: Tensor) -> None:
    """Rounding of float32 sums of n products grows with the square root of n."""
    bound = math.sqrt(matrix.shape[1]) * FLOAT32_EPS * (matrix.abs() @ other.double().abs())
    _require(bool(((product.double() - matrix @ other.double()).abs() <= bound).all()), name)


def _check_nearest(out: Tensor, exact: Tensor) -> None:
    share = 1 - same_bits(out, rounded_once(exact, out.dtype)) / out.numel()
    _require(share <= FLIPS, f"lowrank_update to nearest: {share:.4%} of the elements differ")


def _check_stochastic(out: Tensor, exact: Tensor) -> None:
    """A neighbour of the exact value each, and no bias: the error of one is at most half an ulp in the mean square."""
    off = (out.double() - exact) / ulp(exact, out.dtype)
    _require(float(off.abs().max()) <= 1 + 1e-3, "lowrank_update, stochastic: beyond the neighbours")
    _require(abs(float(off.mean())) <= SIGMAS * 0.5 / math.sqrt(out.numel()), "lowrank_update, stochastic: biased")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongResult(what)


def measure(data: Data, threads: int, repeats: int) -> dict[str, Timing]:
    """Seconds of each kernel over the whole matrix, in turns."""
    workers = Workers(threads)
    run = workers.run
    chunks = max(threads, data.w1.numel() // cpu.TILE_ELEMENTS)
    buffers = torch.ones(chunks, data.w1.numel() // chunks)  # 4 bytes for the pair's 2 + 2
    works: Mapping[str, Callable[[], object]] = {
        "peak: read": lambda: read(buffers, run),
        "forming tiles": lambda: form(data, run),
        "delta_matmul": lambda: delta_matmul(data.w1, data.w0, data.x, run=run),
        "delta_rmatmul": lambda: delta_rmatmul(data.w1, data.w0, data.y, run=run),
        "delta_normal": lambda: delta_normal(data.w1, data.w0, data.x, run=run),
        "lowrank_update nearest": lambda: update(data, run, None),
        "lowrank_update stochastic": lambda: update(data, run, KEY),
    }
    with workers:  # each thread of which computes on one torch thread
        return workers.call(lambda: alternate(repeats, works))


def table(m: int, n: int, columns: Mapping[int, Mapping[str, Timing]]) -> Table:
    """4 bytes an element move in each: a pass over delta reads two weights, an update reads one and writes one."""
    heads = ["kernel"]
    for threads in columns:
        heads += [f"{threads} thread" + "s" * (threads > 1), "GB/s", "of peak"]
    rows = []
    for name in next(iter(columns.values())):
        row = [name]
        for timings in columns.values():
            peak = timings["peak: read"].median
            row += [str(timings[name]), f"{4 * m * n / timings[name].median / 1e9:.1f}",
                    f"{peak / timings[name].median:.0%}"]  # fmt: skip
        rows.append(tuple(row))
    return Table(f"{m} x {n} bf16, {COLUMNS} columns, rank {RANK}", tuple(heads), tuple(rows))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small matrix, one repetition")
    return parsed(parser, argv, 31)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sizes, repeats = (((160, 96),), 1) if args.smoke else (SIZES, args.repeat)
    tables, figures = [], {}
    for m, n in sizes:
        say(f"{m} x {n}")
        data = data_of(m, n)
        try:
            check(data)
        except WrongResult as problem:
            say(f"wrong result, no times: {problem}, {m} x {n}")
            return 1
        columns = {threads: measure(data, threads, repeats) for threads in sorted({1, cores()})}
        tables.append(table(m, n, columns))
        figures[f"{m}x{n}"] = {
            str(threads): {name: timing.record() for name, timing in timings.items()}
            for threads, timings in columns.items()
        }
    finish(
        "bench_kernels", tables, {"repeat": repeats, "columns": COLUMNS, "rank": RANK, "seconds": figures}, args.results
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
