#!/usr/bin/env python3
"""How accurate products with the difference are that tensor cores take in parts, against IEEE float32.

    python benchmarks/bench_split.py          half a minute; on a CPU, it only emulates
    python benchmarks/bench_split.py --smoke  that it works

A number is split into parts of so many bits, each the rest rounded to nearest. Products of parts are exact here, and
their sum is rounded once. "Product" is the relative error of (W1 - W0) @ X against float64, X of 16 columns;
"differing" the share of bf16 outputs that are not the exact result's when the solver takes every product so,
"predicted" what it foretold. What the tensor cores' own sums lose is not in it: the kernels begin a new sum with each
tile (compile_kernels.py sees to that), and a test on a GPU holds the whole product to eight units of float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from bench_svd import SPECTRA
from harness import Table, finish, say
from torch import Tensor

from lox_stream import update
from lox_stream.cli_bench import ALPHA
from lox_stream.comparing import Judge
from lox_stream.contenders import Problem, ours
from lox_stream.kernels.cpu import in_order
from lox_stream.options import Options
from lox_stream.reference import Bands, leading
from lox_stream.synthetic import pair_of

RANK, COLUMNS = 6, 16
LAWS = ("power 0.55", "spikes")
TF32, BF16 = 11, 8  # bits of a significand
# bits of a part, parts, and the products of parts that are taken: those whose numbers add up to less than so many
WAYS: dict[str, tuple[int, int, int]] = {
    "float32": (24, 1, 1),
    "tf32": (TF32, 1, 1),
    "tf32x3": (TF32, 2, 2),
    "bf16x3": (BF16, 2, 2),
    "bf16x6": (BF16, 3, 3),
}


def split(values: Tensor, bits: int, parts: int) -> list[Tensor]:
    """float32 values as sums of numbers with so many bits, float64; a rest is left where the parts do not hold them."""
    rest, found = values.double(), []
    for _ in range(parts):
        fraction, exponent = torch.frexp(rest)
        found.append(torch.ldexp(torch.round(fraction * 2.0**bits), exponent - bits))
        rest = rest - found[-1]
    return found


class InParts:
    """The difference of two weights as an operator whose products are taken in parts."""

    turned, scale = False, 1.0

    def __init__(self, w1: Tensor, w0: Tensor, way: tuple[int, int, int]) -> None:
        self.way = way
        self._delta = w1.float() - w0.float()
        bits, parts, _ = way
        self._parts = split(self._delta, bits, parts)
        self.shape = self._delta.shape

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(self._parts, x)

    def rmatmul(self, y: Tensor) -> Tensor:
        return self._product([part.T for part in self._parts], y)

    def _product(self, left: Sequence[Tensor], x: Tensor) -> Tensor:
        bits, parts, taken = self.way
        right = split(x, bits, parts)
        products = [a @ b for i, a in enumerate(left) for j, b in enumerate(right) if i + j < taken]
        return torch.stack(products).sum(0).float()

    def squared_norm(self) -> float:
        return float(self._delta.double().square().sum())


def measured(law: str, side: int) -> list[tuple[str, ...]]:
    """A row for each way on one planted difference."""
    generator = torch.Generator().manual_seed(0)
    w0, w1 = pair_of(side, side, generator, spectrum=SPECTRA[law](side, side, RANK))
    bands = Bands(w1, w0)
    judge = Judge(bands, leading(bands, RANK + 1), RANK, ALPHA)
    x = torch.randn(side, COLUMNS, generator=generator)
    exact = (w1.double() - w0.double()) @ x.double()
    rows = []
    for name, way in WAYS.items():
        say(f"{law}, {side} x {side}: {name}")
        op = InParts(w1, w0, way)
        error = float((op.matmul(x).double() - exact).norm() / exact.norm())
        with mock.patch.object(update, "operator", lambda *given, op=op, **how: op):
            found = ours(Problem(w1, w0, RANK, ALPHA, 0, in_order), Options().tolerance)
        differing = judge.measure(found)["differing"]
        figures = (f"{error:.1e}", str(found.passes), f"{differing:.2e}", f"{found.predicted_share:.2e}")
        rows.append((f"{law}, {side} x {side}: {name}", *figures))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small matrices")
    parser.add_argument("--results", type=Path, help="also write a Markdown file, and the JSON beside it")
    args = parser.parse_args()
    rows = [row for law in LAWS for row in measured(law, 256 if args.smoke else 1024)]
    heads = ("products", "product", "passes", "differing", "predicted")
    table = Table("Products taken in parts", heads, tuple(rows))
    finish("bench_split", [table], {"rows": [dict(zip(heads, row, strict=True)) for row in rows]}, args.results)


if __name__ == "__main__":
    main()
