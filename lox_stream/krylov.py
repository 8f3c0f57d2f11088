"""Block Krylov iteration for several matrices of one shape at a time.

On A's columns it grows an orthonormal basis P (n, p) of the Krylov space of A'A, and keeps the images A P. Their small
Gram matrix, in float64, gives the best rank-k part that the space holds ("project on all blocks"):

    (A P)'(A P) y = s^2 y        v = P y        u = A P y / s

so A v = s u by construction, and the residual on the other side is bounded without another product.

A step of a small matrix is some forty operations of a few microseconds, so matrices go together: what is small is one
call for all of them. Each has the bits that it has alone, whatever its companions are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lox_stream.bases import DEFLATION, normalising, off, orthonormal
from lox_stream.convergence import Enough, Watch
from lox_stream.costs import GRAM_COLUMNS
from lox_stream.errors import DataError
from lox_stream.operators import FLOAT32_SCALE, Normal, Operator, power_of_two

EVEN = 32.0  # condition of a block's images up to which they are multiplied by A' as they are


class Run:
    """One matrix on its way: its operator, what was seen of it, and its factors once it is done."""

    def __init__(self, op: Operator, rank: int, generator: torch.Generator, enough: Enough) -> None:
        self.op = op
        self.scale = 1.0  # of what is iterated: A * scale, a power of two, for products within float32
        self.watch = Watch(rank)
        self.passes = 0
        self.normal: Normal | None = getattr(op, "normal", None)
        self.factors: tuple[Tensor, Tensor, Tensor] | None = None  # u', s, v'
        self._generator = generator
        self._enough = enough

    def start(self, width: int) -> Tensor:
        """(width, n) rows in the range of A'."""
        m, n = self.op.shape
        random = torch.randn(width, m, generator=self._generator, dtype=torch.float32)
        rows = self.backward(random)
        norm = math.sqrt(self.op.squared_norm())
        if not (norm <= torch.finfo(torch.float32).max and bool(rows.isfinite().all())):
            raise DataError(f"the matrix {(m, n)} has norm {norm} or a product with it is not finite, expected float32")
        self.scale = power_of_two(norm / math.sqrt(m * n), FLOAT32_SCALE)
        if self.scale != 1.0:
            self.normal = None  # between its products nothing can be scaled
            rows = self.backward(random)
        return rows

    def forward(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images of the rows of `block` (width, n) and, unless this seems to be the last step, A' times them."""
        self.passes += 1
        if self.normal is not None and not self.watch.one_to_go(self.enough):
            image, back = self.normal(block.T)
            return image.T, back.T
        return self.op.matmul(self._scaled(block).T).T, None

    def backward(self, rows: Tensor) -> Tensor:
        """A' times each of `rows` (width, m)."""
        self.passes += 1
        return self.op.rmatmul(self._scaled(rows).T).T

    def enough(self, error: float, part: float) -> bool:
        """Whether `error` is small enough, both of A * scale."""
        return self._enough(error / self.scale, part / self.scale)

    def squared_norm(self) -> float:
        """|A * scale|_F^2."""
        return self.op.squared_norm() * self.scale**2

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale == 1.0 else rows * self.scale


def iterate(runs: list[Run], rank: int, width: int, columns: int) -> None:
    """Grow the spaces of all runs, block by block; each leaves when it is done."""
    space = Space(runs[0].op.shape, len(runs), rank, columns)
    block, solid = _first_block(runs, width, space)
    while runs:
        spent = [not some for some in solid.any(1).tolist()]
        if any(spent):
            _exhaust(runs, spent)
            runs, stay = space.leave(runs, spent)
            block, solid = block[stay], solid[stay]
            continue
        products = [run.forward(rows) for run, rows in zip(runs, block, strict=True)]
        space.append(block, solid, torch.stack([image for image, _ in products]))
        space.look(runs)
        whole = (space.room <= 0).tolist()
        _exhaust(runs, whole)
        full = space.size + width > columns
        ends = [full or end or run.watch.settled(run.enough) for run, end in zip(runs, whole, strict=True)]
        runs, stay = space.leave(runs, ends)
        if runs:
            runs, block, solid = space.next_block(runs, [products[i][1] for i in stay])


def _first_block(runs: list[Run], width: int, space: Space) -> tuple[Tensor, Tensor]:
    """Random rows times A', and times A'A: the second product costs what a step does and none of its columns.

    Measured on 36 deltas of training and planted spectra: as many passes as with both blocks in the basis, or 2 % more.
    """
    none, norm = space.basis[:, :0], torch.zeros(len(runs), dtype=torch.float64)
    block, _ = orthonormal(torch.stack([run.start(width) for run in runs]), none, norm, space.room)
    products = [run.forward(rows) for run, rows in zip(runs, block, strict=True)]
    images = torch.stack([image for image, _ in products])
    wide = images.double()
    rows, noise, _ = _backward(runs, images, wide @ wide.mT, [back for _, back in products], norm)
    return orthonormal(rows, none, noise, space.room)


def _backward(
    runs: list[Run], images: Tensor, gram: Tensor, backs: list[Tensor | None], norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A' times orthonormal rows that span the images (c, b, m).

    Returns those rows (c, b, n), the size (c,) that noise in them is a share of, and the matrices (c, b, b) that give
    the images back from the orthonormal rows.

    The images are orthonormalised before they are multiplied, or the product would square their condition. Where that
    is small, those that were multiplied as they are (`backs`) do as well, with noise in proportion to it.
    """
    turn, _, _ = normalising(gram, norm, torch.full((len(runs),), images.shape[2]))
    condition = torch.linalg.matrix_norm(turn) * gram.diagonal(dim1=1, dim2=2).sum(1).sqrt() / gram.shape[1]
    rows, noise = [], []
    for i, (run, back, uneven) in enumerate(zip(runs, backs, condition.tolist(), strict=True)):
        if uneven > EVEN:
            back = run.normal = None
        if back is None:
            rows.append(run.backward((turn[i] @ images[i].double()).float()))
            noise.append(1.0)
        else:
            rows.append((turn[i] @ back.double()).float())
            noise.append(max(uneven, 1.0))
            run.watch.noise = max(run.watch.noise, uneven)
    return torch.stack(rows), norm * torch.tensor(noise, dtype=norm.dtype), gram @ turn.mT


def _exhaust(runs: list[Run], which: list[bool]) -> None:
    for run, it in zip(runs, which, strict=True):
        if it:
            run.watch.exhaust()


class Space:
    """Bases, images and Gram matrices of `count` matrices (m, n), all of one size.

    A direction that was dropped is a row of zeros, so that they go in step.
    """

    def __init__(self, shape: tuple[int, int], count: int, rank: int, columns: int) -> None:
        m, n = shape
        self.size = 0
        self.basis = torch.empty(count, columns, n, dtype=torch.float32)  # P'
        self.image = torch.empty(count, columns, m, dtype=torch.float32)  # (A P)'
        self.gram = torch.zeros(count, 0, 0, dtype=torch.float64)
        self.y = torch.zeros(count, 0, rank, dtype=torch.float64)  # of the last look
        self.s = torch.zeros(count, rank, dtype=torch.float64)
        self._width = 0  # of the newest block
        self.room = torch.full((count,), n)  # dimensions left: rounding must not pass for more of them

    def append(self, block: Tensor, solid: Tensor, image: Tensor) -> None:
        """Take blocks (count, width, n) of rows that are orthonormal, or zero where not `solid`, and their images."""
        old, self._width = self.size, block.shape[1]
        self.size = size = old + self._width
        self.basis[:, old:size] = block
        self.image[:, old:size] = image
        self.room = self.room - solid.sum(1)
        newest = image.double()
        gram = torch.empty(len(image), size, size, dtype=torch.float64)
        gram[:, :old, :old] = self.gram
        gram[:, old:] = 0.0
        for first in range(0, newest.shape[2], GRAM_COLUMNS):  # in float64, as many as stay in the cache
            part = slice(first, first + GRAM_COLUMNS)
            gram[:, old:] += newest[:, :, part] @ self.image[:, :size, part].double().mT
        gram[:, :old, old:] = gram[:, old:, :old].mT
        self.gram = gram

    def look(self, runs: list[Run]) -> None:
        """Take the leading eigenpairs of the Gram matrices and show the runs what they mean."""
        _, seen, rank = self.y.shape
        values, vectors = torch.linalg.eigh(self.gram)
        s = values[:, -rank - 1 :].flip(1).clamp(min=0).sqrt()
        solid = s > DEFLATION * s[:, :1]
        s = s * solid
        y = vectors[:, :, -rank - 1 :].flip(2) * solid[:, None]
        leading = y[:, :, :rank]
        # |B - B'|^2 = |B|^2 + |B'|^2 - 2 <B, B'>, with B = A P y y' P'; eight digits are enough
        inner = (leading[:, :seen].mT @ self.y) * (leading.mT @ (self.gram[:, :, :seen] @ self.y))
        steps = s[:, :rank].square().sum(1) + self.s.square().sum(1) - 2 * inner.sum((1, 2))
        # The residual A'u - s v is (I - PP')A' applied to the newest images' share of u: earlier ones lie in the space
        newest = y[:, -self._width :]
        shares = (newest * (self._newest_gram() @ newest)).sum(1).clamp(min=0).sqrt()
        traces = self.gram.diagonal(dim1=1, dim2=2).sum(1)
        figures = torch.cat([steps[:, None], traces[:, None], s, shares], 1).tolist()
        for run, (step, trace, *rest) in zip(runs, figures, strict=True):
            run.watch.look(step, trace, rest[: rank + 1], rest[rank + 1 :], run.squared_norm())
        self.y, self.s = leading, s[:, :rank]

    def _newest_gram(self) -> Tensor:
        return self.gram[:, -self._width :, -self._width :]

    def next_block(self, runs: list[Run], backs: list[Tensor | None]) -> tuple[list[Run], Tensor, Tensor]:
        """Orthonormal rows of A' times the newest images, off the basis; `backs` has what is multiplied already.

        Those for which half a step is enough leave; the others are returned.
        """
        images = self.image[:, self.size - self._width : self.size]
        rows, noise, undo = _backward(runs, images, self._newest_gram(), backs, self.s[:, 0])
        ends = [run.watch.half_way(run.enough) for run in runs]
        if any(ends):
            shares = self.y[:, -self._width :].mT @ undo
            for i, run in enumerate(runs):
                if ends[i]:
                    run.factors = self._half_step(i, run, shares[i], rows[i])
        runs, stay = self.leave(runs, ends)
        rows, noise = (rows, noise) if len(stay) == len(rows) else (rows[stay], noise[stay])
        return runs, *orthonormal(rows, self.basis[:, : self.size], noise, self.room)

    def _half_step(self, i: int, run: Run, share: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of U U'A, half a step nearer than U S V': for A'u is known once the newest images are multiplied.

        A'u = s v + rest, the rest being what A' times the newest images' share (k, b) of s u has off the basis.
        """
        left, s, right = self._factors(i)
        beyond = off(rows[None], self.basis[i : i + 1, : self.size])[0]
        rest = (share[: len(s)] / self.s[i, : len(s), None]).float() @ beyond
        across = (s[:, None] * right + rest).double()
        values, turn = torch.linalg.eigh(across @ across.T)
        t, turn = values.flip(0).clamp(min=0).sqrt(), turn.flip(1).T
        run.watch.half_step(t.tolist(), torch.linalg.vector_norm(turn @ rest.double(), dim=1).tolist())
        return (turn @ left.double()).float(), t.float(), (turn / t[:, None] @ across).float()

    def leave(self, runs: list[Run], ends: list[bool]) -> tuple[list[Run], list[int]]:
        """Hand factors to those that end and have none yet; returns the others, and where they stood."""
        stay = [i for i, end in enumerate(ends) if not end]
        if len(stay) == len(runs):
            return runs, stay
        for i, run in enumerate(runs):
            if ends[i]:
                run.factors = run.factors or self._factors(i)
        self.basis, self.image = (_moved(rows, stay, self.size) for rows in (self.basis, self.image))
        self.gram, self.y, self.s, self.room = (t[stay] for t in (self.gram, self.y, self.s, self.room))
        return [runs[i] for i in stay], stay

    def _factors(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """u' (k, m), s (k,), v' (k, n) float32 of the last look."""
        s = self.s[i][self.s[i] > 0]
        y = self.y[i, :, : len(s)]
        seen = slice(0, len(y))
        return (y / s).T.float() @ self.image[i, seen], s.float(), y.T.float() @ self.basis[i, seen]


def _moved(stack: Tensor, stay: list[int], size: int) -> Tensor:
    """Some of a stack in memory of their own; of their rows the first `size` count."""
    moved = torch.empty(len(stay), *stack.shape[1:], dtype=stack.dtype)
    for to, i in enumerate(stay):
        moved[to, :size] = stack[i, :size]
    return moved
