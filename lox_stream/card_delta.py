"""delta = W1 - W0 as an operator whose products are taken on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lox_stream.blocks import Blocks
from lox_stream.cards import Lane
from lox_stream.delta import Delta
from lox_stream.kernels import GPUKernels, Run


class DeltaOnCard(Delta):
    """`Delta` of weights that lie on a card, or come to it block by block; its products go to the lane `compute`.

    `w1` and `w0` are those on the host, for the looks at single elements. A product is taken in the order of the blocks
    and has the same bits whatever they are. To be used within `compute.entered()`.
    """

    def __init__(
        self,
        w1: Tensor,
        w0: Tensor,
        blocks: Blocks,
        compute: Lane,
        kernels: GPUKernels,
        device: torch.device,
        run: Run,
        *,
        rms: float = 1.0,
    ) -> None:
        super().__init__(w1, w0, run, rms=rms)
        self.device = device
        self._blocks, self._compute, self._kernels = blocks, compute, kernels

    def _forward(self, x: Tensor, squares: list[float] | None) -> Tensor:
        out, sums = self._images(x), _wanted(squares)
        for rows, w1, w0 in self._blocks.walk():
            self._compute.launch(self._image(out, rows, w1, w0, x, sums))
        self._fetch(sums, squares)
        return out

    def _backward(self, y: Tensor, squares: list[float] | None) -> Tensor:
        parts, sums = self._parts(y), _wanted(squares)
        for rows, w1, w0 in self._blocks.walk():
            self._compute.launch(self._terms(parts, rows, w1, w0, y, sums))
        self._fetch(sums, squares)
        return self._kernels.total(parts).T

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._images(x)
        parts = self._parts(y)
        for rows, w1, w0 in self._blocks.walk():
            self._compute.launch(self._image(y, rows, w1, w0, x, None))
            self._compute.launch(self._terms(parts, rows, w1, w0, y, None))
        return y, self._kernels.total(parts).T

    def _images(self, x: Tensor) -> Tensor:
        return torch.empty(self.shape[0], x.shape[1], dtype=torch.float32, device=self.device)

    def _parts(self, y: Tensor) -> Tensor:
        m, n = self.shape
        count = -(-m // self._kernels.part_rows(m, n))
        return torch.empty(count, y.shape[1], n, dtype=torch.float32, device=self.device)

    def _image(
        self, out: Tensor, rows: slice, w1: Tensor, w0: Tensor, x: Tensor, sums: list[Tensor] | None
    ) -> Callable[[], None]:
        """Takes the rows of A @ x that a block gives."""
        m, scale = self.shape[0], self.scale

        def work() -> None:
            out[rows] = self._kernels.delta_matmul(w1, w0, x, whole=m, scale=scale, squares=sums)

        return work

    def _terms(
        self, parts: Tensor, rows: slice, w1: Tensor, w0: Tensor, y: Tensor, sums: list[Tensor] | None
    ) -> Callable[[], None]:
        """Takes the terms of A.T @ y that a block gives."""
        (m, n), scale = self.shape, self.scale
        first = rows.start // self._kernels.part_rows(m, n)

        def work() -> None:
            found = self._kernels.partial_products(w1, w0, y[rows], whole=m, scale=scale, squares=sums)
            parts[first : first + len(found)] = found

        return work

    def _fetch(self, sums: list[Tensor] | None, squares: list[float] | None) -> None:
        if sums is not None and squares is not None:
            self._compute.record().wait()
            squares.extend(torch.cat(sums).tolist())


def _wanted(squares: list[float] | None) -> list[Tensor] | None:
    return None if squares is None else []
