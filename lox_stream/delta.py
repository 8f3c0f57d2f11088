"""delta = W1 - W0 as an operator over two weights that stay where they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lox_stream.costs import kept
from lox_stream.errors import DataError
from lox_stream.kernels import WIDE, delta_matmul, delta_normal, delta_rmatmul, difference, sum_of_squares, tiling
from lox_stream.kernels.cpu import Run
from lox_stream.operators import FLOAT32_SCALE, FLOAT64_SCALE, power_of_two

SANE = (1e-24, 1e24)  # |delta|_F^2 that float32 sums hold without rounding to zero or infinity


Product = Callable[[Tensor, list[float] | None], Tensor]  # the other factor, and a list for the sums of squares


class NotFinite(DataError):
    """A weight holds NaN or Inf."""


class OutOfRange(NotFinite):
    """A number is beyond the range of the output's dtype."""


class Delta:
    """(W1 - W0) * scale: two (m, n) weights of any float dtypes, multiplied tile by tile in float32.

    `scale` is a power of two, chosen so that the products neither overflow nor vanish: from `rms`, a guess of an
    entry's size, and again from the true largest entry if the first product shows that the guess was bad. Divide
    singular values by it. The sum of squares is taken in the first product. Raises NotFinite from that product.
    """

    turned = False

    def __init__(self, w1: Tensor, w0: Tensor, run: Run, *, rms: float = 1.0) -> None:
        self.w1, self.w0 = w1, w0
        self.run = run
        self.scale = _scale_for(rms, w1, w0)
        self._squares: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0], self.w1.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        """delta * scale @ x: (n, l) -> (m, l)."""
        return self._product(self._forward, x)

    def rmatmul(self, y: Tensor) -> Tensor:
        """(delta * scale).T @ y: (m, l) -> (n, l)."""
        return self._product(self._backward, y)

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = delta * scale @ x and (delta * scale).T @ y: (n, l) -> (m, l) and (n, l), in one pass where that goes."""
        if self._squares is None:
            y = self.matmul(x)
            return y, self.rmatmul(y)
        return self._both(x)

    def _product(self, product: Product, x: Tensor) -> Tensor:
        if self._squares is not None:
            return product(x, None)
        found = self._first(product, x)
        scale = _better_scale(self.squared_norm(), self.w1, self.w0, self.run)
        if scale is not None:
            self.scale = scale
            found = self._first(product, x)
        return found

    def _first(self, product: Product, x: Tensor) -> Tensor:
        squares: list[float] = []
        found = product(x, squares)
        self._squares = _sum(squares)
        return found

    def _forward(self, x: Tensor, squares: list[float] | None) -> Tensor:
        return delta_matmul(self.w1, self.w0, x, scale=self.scale, squares=squares, run=self.run)

    def _backward(self, y: Tensor, squares: list[float] | None) -> Tensor:
        return delta_rmatmul(self.w1, self.w0, y, scale=self.scale, squares=squares, run=self.run)

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.shape[1] > WIDE:
            y = self._forward(x, None)
            return y, self._backward(y, None)
        return delta_normal(self.w1, self.w0, x, scale=self.scale, run=self.run)

    def squared_norm(self) -> float:
        """|delta * scale|_F^2, known after the first product."""
        assert self._squares is not None, "no product was taken yet"
        return self._squares


class KeptDelta:
    """The same for small weights: the difference is formed once, for that is half of a pass.

    It lies in `room` (m, n) float32, or in memory of its own. Raises NotFinite when it is made.
    """

    def __init__(self, w1: Tensor, w0: Tensor, run: Run, *, rms: float = 1.0, room: Tensor | None = None) -> None:
        self.run = run
        self.scale = _scale_for(rms, w1, w0)
        self.turned = w1.shape[0] < w1.shape[1]
        self.dense = torch.empty(w1.shape, dtype=torch.float32) if room is None else room  # (W1 - W0) * scale
        self._squares = self._form(w1, w0)
        scale = _better_scale(self._squares, w1, w0, run)
        if scale is not None:
            self.scale = scale
            self._squares = self._form(w1, w0)

    def _form(self, w1: Tensor, w0: Tensor) -> float:
        rows, columns = tiling(*w1.shape)
        squares = []
        for top in range(0, w1.shape[0], rows):
            for left in range(0, w1.shape[1], columns):
                tile = slice(top, top + rows), slice(left, left + columns)
                squares.append(sum_of_squares(difference(w1[tile], w0[tile], self.scale, self.dense[tile])))
        return _sum(squares)

    @property
    def shape(self) -> tuple[int, int]:
        short, long = sorted(self.dense.shape)
        return long, short

    def matmul(self, x: Tensor) -> Tensor:
        """delta * scale @ x, turned: (n, l) -> (m, l)."""
        return self._product(self._rows if self.turned else self._columns, x)

    def rmatmul(self, y: Tensor) -> Tensor:
        """(delta * scale).T @ y, turned: (m, l) -> (n, l)."""
        return self._product(self._columns if self.turned else self._rows, y)

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = delta * scale @ x and (delta * scale).T @ y, turned: the second finds the matrix in the cache."""
        y = self.matmul(x)
        return y, self.rmatmul(y)

    def _product(self, by: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """By `run`, where a request to stop is seen."""
        product: list[Tensor] = []
        self.run(lambda _: product.append(by(x)), 1)
        return product[0]

    def _columns(self, x: Tensor) -> Tensor:
        return torch.mm(x.T, self.dense.T).T

    def _rows(self, y: Tensor) -> Tensor:
        return torch.mm(y.T, self.dense).T

    def squared_norm(self) -> float:
        """|delta * scale|_F^2."""
        return self._squares


def operator(w1: Tensor, w0: Tensor, run: Run, *, rms: float, room: Tensor | None = None) -> Delta | KeptDelta:
    """The difference of two (m, n) weights: kept, in `room`, where it is small."""
    if kept(*w1.shape):
        return KeptDelta(w1, w0, run, rms=rms, room=room)
    return Delta(w1, w0, run, rms=rms)


def _scale_for(size: float, w1: Tensor, w0: Tensor) -> float:
    """Within float32, unless the difference is formed in float64."""
    wide = torch.float64 in (w1.dtype, w0.dtype)
    return power_of_two(size, FLOAT64_SCALE if wide else FLOAT32_SCALE)


def _better_scale(squares: float, w1: Tensor, w0: Tensor, run: Run) -> float | None:
    """That of the true largest entry where the sum of squares shows a bad guess; None where it is fine, or all zero."""
    if SANE[0] < squares < SANE[1]:
        return None
    largest = largest_entry(w1, w0, run)
    return _scale_for(largest, w1, w0) if largest > 0 else None


def _sum(squares: list[float]) -> float:
    return math.fsum(squares) if all(map(math.isfinite, squares)) else math.inf


def largest_entry(w1: Tensor, w0: Tensor, run: Run) -> float:
    """max |W1 - W0| in float64, or NotFinite with the first bad index. A slow path: weights that are unusual."""
    rows, columns = tiling(*w1.shape)
    count = -(-w1.shape[0] // rows)
    largest = [0.0] * count

    def task(i: int) -> None:
        band = slice(i * rows, (i + 1) * rows)
        for j in range(0, w1.shape[1], columns):
            part = slice(j, j + columns)
            tile = (w1[band, part].double() - w0[band, part].double()).abs_()
            most = float(tile.max())
            largest[i] = max(largest[i], most if math.isfinite(most) else math.inf)

    run(task, count)
    if math.inf in largest:
        band = slice(largest.index(math.inf) * rows, None)
        raise NotFinite(first_not_finite(w1[band], w0[band], band.start))
    return max(largest)


def first_not_finite(w1: Tensor, w0: Tensor, first_row: int = 0) -> str:
    """Where the first NaN or Inf is, in words: "aligned has nan at [3, 7]"."""
    for row in range(w1.shape[0]):
        for side, weight in (("aligned", w1), ("base", w0)):
            if bool(weight[row].isfinite().all()):
                continue
            column = int((~weight[row].isfinite()).nonzero()[0, 0])
            return f"{side} has {float(weight[row, column])} at [{first_row + row}, {column}]"
    return "the difference of base and aligned is beyond float64"
