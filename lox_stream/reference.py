"""The leading triplets of delta in float64: what the solvers of the benchmark are judged by.

LAPACK where the short side is at most 1024; else block Lanczos with full reorthogonalisation and thick restart (Wu and
Simon 2000), run until rounding is all that is left. It shares no code with the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_stream.errors import DataError

Product = Callable[[Tensor], Tensor]

LAPACK_UP_TO = 1024  # of the short side: about a second
SETTLED = 1e-13  # |A'A v - s^2 v| / s_1^2 that ends the iteration
MOST_COLUMNS = 640
KEPT_BYTES = 4 << 30  # of delta in float64; a larger one is formed in bands, in each pass anew
BAND_ELEMENTS = 1 << 23
MOST_STEPS = 4000


@dataclass(frozen=True, slots=True)
class Leading:
    """u (m, c), s (c,), vh (c, n) in float64, descending: the leading triplets, one more than asked for if there is."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def gap(self, rank: int) -> float:
        """(s_k - s_(k+1)) / s_k."""
        if rank >= len(self.s) or float(self.s[rank - 1]) == 0.0:
            return 1.0
        return float((self.s[rank - 1] - self.s[rank]) / self.s[rank - 1])


def _difference(w1: Tensor, w0: Tensor) -> Tensor:
    return w1.to(torch.float64, copy=True).sub_(w0)


class Bands:
    """W1 - W0 (m, n) in float64, band of rows by band of rows."""

    def __init__(self, w1: Tensor, w0: Tensor) -> None:
        self.w1, self.w0 = w1, w0
        rows = max(1, BAND_ELEMENTS // w1.shape[1])
        self.slices = [slice(top, top + rows) for top in range(0, w1.shape[0], rows)]
        kept = 8 * w1.numel() <= KEPT_BYTES
        self._whole = _difference(w1, w0) if kept else None

    def __getitem__(self, band: slice) -> Tensor:
        if self._whole is not None:
            return self._whole[band]
        return _difference(self.w1[band], self.w0[band])

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([self[band] @ x for band in self.slices])

    def rmatmul(self, y: Tensor) -> Tensor:
        total = torch.zeros(self.w1.shape[1], y.shape[1], dtype=torch.float64)
        for band in self.slices:
            total += self[band].T @ y[band]
        return total


def leading(delta: Bands, rank: int, *, lapack_up_to: int = LAPACK_UP_TO) -> Leading:
    """The `rank` + 1 leading triplets of delta, or all min(m, n) of them; DataError if they do not settle."""
    m, n = delta.w1.shape
    count = min(rank + 1, m, n)
    if min(m, n) <= max(lapack_up_to, 8 * count):
        u, s, vh = torch.linalg.svd(torch.cat([delta[band] for band in delta.slices]), full_matrices=False)
        return Leading(u[:, :count], s[:count], vh[:count])
    if m >= n:
        return Leading(*_lanczos(delta.matmul, delta.rmatmul, n, count))
    u, s, vh = _lanczos(delta.rmatmul, delta.matmul, m, count)
    return Leading(vh.T, s, u.T)


def _lanczos(matmul: Product, rmatmul: Product, n: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of A from the Krylov space of A'A; `matmul` is by A (m, n), `rmatmul` by A'."""
    width = count + 16
    most = min(max(MOST_COLUMNS, 6 * width), n)
    block = torch.linalg.qr(torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    basis, images = block[:, :0], matmul(block)[:, :0]
    for _ in range(MOST_STEPS):
        basis, images = torch.cat([basis, block], 1), torch.cat([images, matmul(block)], 1)
        squares, y = torch.linalg.eigh(images.T @ images)
        s, y = squares.flip(0).clamp(min=0).sqrt(), y.flip(1)
        rest = rmatmul(images[:, -block.shape[1] :])
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        residual = torch.linalg.vector_norm(rest @ y[-block.shape[1] :, :count], dim=0)
        if float(residual.max()) <= SETTLED * float(squares[-1]):
            return images @ (y[:, :count] / s[:count]), s[:count], (basis @ y[:, :count]).T
        if basis.shape[1] + width > most:
            keep = y[:, : count + width]
            basis, images = basis @ keep, images @ keep
        block = torch.linalg.qr(rest)[0]
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    raise DataError(
        f"the float64 result did not settle in {MOST_STEPS} steps, expected residuals of {SETTLED:g}. Compare others "
        "matrices, or another rank"
    )
