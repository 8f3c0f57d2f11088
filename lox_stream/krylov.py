"""Block Krylov iteration for several matrices of one shape at a time.

On A's columns it grows an orthonormal basis P (n, p) of the Krylov space of A'A, and keeps the images A P. Their small
Gram matrix, in float64, gives the best rank-k part that the space holds ("project on all blocks"):

    (A P)'(A P) y = s^2 y        v = P y        u = A P y / s

so A v = s u by construction, and the residual on the other side is bounded without another product.

A basis that is full begins anew with its leading part (thick restart, Wu & Simon 2000): the singular vectors that it
gives, of which A'A is known to leave no more than the next block. So its size, and what is cubic in it, is bounded.

What is as long as the matrix lies on the device of its products; what is small lies on the host, where LAPACK takes
microseconds for it. Two small Gram matrices a block come to the host, which waits for them; nothing else does.

A step of a small matrix is some forty operations of a few microseconds, so matrices go together: what is small is one
call for all of them. Each has the bits that it has alone, whatever its companions are.
"""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from lox_stream.bases import DEFLATION, off, orthonormal
from lox_stream.convergence import Enough, Watch
from lox_stream.costs import GRAM_COLUMNS, kept_columns
from lox_stream.errors import DataError
from lox_stream.operators import FLOAT32_SCALE, Normal, Operator, device_of, power_of_two, upload

FIRST_LOOK = 10  # columns over the rank, before which the leading part is not worth a look
EVEN = 32.0  # condition of a block's images up to which they are multiplied by A' as they are


class Run:
    """One matrix on its way: its operator, what was seen of it, and its factors once it is done."""

    def __init__(self, op: Operator, rank: int, generator: torch.Generator, enough: Enough) -> None:
        self.op = op
        self.device = device_of(op)
        self.scale = 1.0  # of what is iterated: A * scale, a power of two, for products within float32
        self.watch = Watch(rank)
        self.passes = 0
        self.normal: Normal | None = getattr(op, "normal", None)
        self.back: Tensor | None = None  # A' times the newest images, where they were multiplied at once
        self.room = op.shape[1]  # dimensions left: rounding must not pass for more of them
        self.norm = 0.0  # of A * scale, from below
        self.trace = 0.0  # |A P|_F^2
        self.factors: tuple[Tensor, Tensor, Tensor] | None = None  # u', s, v'
        self._generator = generator
        self._enough = enough

    def start(self, width: int) -> Tensor:
        """(width, n) rows in the range of A'."""
        m, n = self.op.shape
        random = upload(torch.randn(width, m, generator=self._generator, dtype=torch.float32), self.device)
        rows = self.backward(random)
        norm = math.sqrt(self.op.squared_norm())
        if not (norm <= torch.finfo(torch.float32).max and bool(rows.isfinite().all())):
            raise DataError(f"the matrix {(m, n)} has norm {norm} or a product with it is not finite, expected float32")
        self.scale = power_of_two(norm / math.sqrt(m * n), FLOAT32_SCALE)
        if self.scale != 1.0:
            self.normal = None  # between its products nothing can be scaled
            rows = self.backward(random)
        return rows

    def forward(self, block: Tensor, *, last: bool = False) -> Tensor:
        """Images of the rows of `block` (width, n); `back` is A' times them unless this is the `last` step."""
        self.passes += 1
        if self.normal is None or last:
            self.back = None
            return self.op.matmul(self._scaled(block).T).T
        image, back = self.normal(block.T)
        self.back = back.T
        return image.T

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


def iterate(runs: list[Run], rank: int, width: int, columns: int, most_blocks: int) -> None:
    """Grow the spaces of all runs, block by block; each leaves when it is done."""
    space = Space(runs[0].op.shape, len(runs), rank, columns, runs[0].device)
    block, found = _first_block(runs, width, space)
    while runs:
        spent = [count == 0 for count in found]
        if any(spent):
            runs, stay = space.leave_exhausted(runs, spent)
            block, found = block[stay], [found[i] for i in stay]
            continue
        last = runs[0].watch.blocks + 1 == most_blocks
        due = last or (space.size + width >= rank + FIRST_LOOK and not space.begun_anew)
        images = [
            run.forward(rows, last=due and run.watch.one_to_go(run.enough))
            for run, rows in zip(runs, block, strict=True)
        ]
        space.append(runs, block, found, torch.stack(images))
        runs, _ = space.leave_exhausted(runs, [run.room == 0 for run in runs])
        if due and runs:
            space.look(runs)
            runs, _ = space.leave(runs, [last or run.watch.settled(run.enough) for run in runs])
        if runs:
            runs, block, found = space.next_block(runs, looked=due)
        if runs and space.size + width > columns:
            space.begin_anew(runs)


def _first_block(runs: list[Run], width: int, space: Space) -> tuple[Tensor, list[int]]:
    """Random rows times A', and times A'A: the second product costs what a step does and none of its columns.

    Measured on 36 deltas of training and planted spectra: as many passes as with both blocks in the basis, or 2 % more.
    """
    none, norm, room = space.basis[:, :0], [0.0] * len(runs), [run.room for run in runs]
    block, _ = orthonormal(torch.stack([run.start(width) for run in runs]), none, norm, room)
    images = torch.stack([run.forward(rows) for run, rows in zip(runs, block, strict=True)])
    wide = images.double()
    rows, _, _ = _backward(runs, images, (wide @ wide.mT).cpu())
    return orthonormal(rows, none, norm, room)


def _backward(runs: list[Run], images: Tensor, gram: Tensor) -> tuple[Tensor, list[float], list[Tensor | None]]:
    """A' times rows that span the newest images (c, b, m), of which the Gram matrices (c, b, b) are given, on the host.

    Returns the products (c, b, n), the length of the longest row that was multiplied, which noise is a share of, and
    the matrices (b, b) that give the images back from those rows; None where they are the images.

    The images should be orthonormal before they are multiplied, or the product would square their condition. Where
    that is small, those that were multiplied as they are do as well, with noise in proportion to it.
    """
    values, vectors = torch.linalg.eigh(gram)
    roots = values.clamp(min=0).sqrt()
    rows, longest, undo = [], [], []
    for i, (run, lengths) in enumerate(zip(runs, roots.tolist(), strict=True)):
        if not 0 < lengths[-1] <= EVEN * lengths[0]:
            run.normal = run.back = None
        if run.back is None:
            turn = torch.where(roots[i] > DEFLATION * lengths[-1], 1 / roots[i], 0.0)[:, None] * vectors[i].T
            rows.append(run.backward((upload(turn, run.device) @ images[i].double()).float()))
            longest.append(1.0)
            undo.append(vectors[i] * roots[i])
        else:
            rows.append(run.back)
            longest.append(lengths[-1])
            undo.append(None)
            run.watch.noise = max(run.watch.noise, lengths[-1] / lengths[0])
    return torch.stack(rows), longest, undo


class Space:
    """Bases, images and Gram matrices of `count` matrices (m, n), all of one size.

    A direction that was dropped is a row of zeros, so that they go in step.
    """

    def __init__(self, shape: tuple[int, int], count: int, rank: int, columns: int, device: torch.device) -> None:
        m, n = shape
        self.size = 0
        self.basis = torch.empty(count, columns, n, dtype=torch.float32, device=device)  # P'
        self.image = torch.empty(count, columns, m, dtype=torch.float32, device=device)  # (A P)'
        self.gram = torch.zeros(count, 0, 0, dtype=torch.float64)
        self.y = torch.zeros(count, 0, rank, dtype=torch.float64)  # of the last look
        self.s: list[list[float]] = [[]] * count
        self.squares = self.vectors = self.gram  # all of it
        self.begun_anew = False  # since the newest block
        self._width = 0  # of the newest block

    def append(self, runs: list[Run], block: Tensor, found: list[int], image: Tensor) -> None:
        """Take blocks (count, width, n) of orthonormal rows, of which so many are not zero, and their images."""
        old, self._width, self.begun_anew = self.size, block.shape[1], False
        self.size = size = old + self._width
        self.basis[:, old:size] = block
        self.image[:, old:size] = image
        wide, new = image.double(), self.image.new_zeros(len(image), self._width, size, dtype=torch.float64)
        for first in range(0, image.shape[2], GRAM_COLUMNS):  # in float64, as many as stay in the cache
            part = slice(first, first + GRAM_COLUMNS)
            new += wide[:, :, part] @ self.image[:, :size, part].double().mT
        new = new.cpu()
        self.gram = torch.cat([torch.cat([self.gram, new[:, :, :old].mT], 2), new], 1)
        squares = self._newest_gram().diagonal(dim1=1, dim2=2).tolist()
        for run, count, lengths in zip(runs, found, squares, strict=True):
            run.room -= count
            run.watch.blocks += 1
            run.trace += math.fsum(lengths)
            run.norm = max(run.norm, math.sqrt(max(lengths)))

    def look(self, runs: list[Run]) -> None:
        """Take the leading eigenpairs of the Gram matrices and show the runs what they mean."""
        _, seen, rank = self.y.shape
        self.squares, self.vectors = values, vectors = torch.linalg.eigh(self.gram)
        y = vectors[:, :, -rank - 1 :].flip(2)
        # <B, B'> of B = A P y y' P', where y' P'A'A P = s^2 y'
        shared = (y[:, :seen, :rank].mT @ self.y).square().sum(2).tolist()
        # The residual A'u - s v is (I - PP')A' applied to the newest images' share of u: earlier ones lie in the space
        newest = y[:, -self._width :]
        shares = (newest * (self._newest_gram() @ newest)).sum(1).tolist()
        last, self.s = self.s, []
        for run, squares, same, newest_squares, old in zip(runs, values.tolist(), shared, shares, last, strict=True):
            s = [math.sqrt(max(square, 0.0)) for square in squares[: -rank - 2 : -1]]
            s = [value if value > DEFLATION * s[0] else 0.0 for value in s]
            inner = sum(value * value * part for value, part in zip(s, same, strict=False))
            step = sum(value * value for value in (*s[:rank], *old)) - 2 * inner
            parts = [math.sqrt(max(square, 0.0)) for square in newest_squares]
            run.watch.look(step, run.trace, s, parts, run.squared_norm())
            self.s.append(s[:rank])
        self.y = y[:, :, :rank]

    def begin_anew(self, runs: list[Run]) -> None:
        """Keep what the last look found to be the leading part.

        The next block must be off all that there was, and is: of what is kept, A'A is in the kept part and that block.
        """
        n, first = self.basis.shape[2], self.size - kept_columns(self.basis.shape[1])
        squares, turn = self.squares[:, first:].flip(1), self.vectors[:, :, first:].flip(2).mT
        real = squares > DEFLATION**2 * squares[:, :1]  # the others are rows of zeros, or rounding
        turn, squares = turn * real[:, :, None], squares * real
        rows = upload(turn.float(), self.basis.device)
        old, self.size, self.begun_anew = self.size, turn.shape[1], True
        self.basis[:, : self.size] = rows @ self.basis[:, :old]
        self.image[:, : self.size] = rows @ self.image[:, :old]
        self.gram = torch.diag_embed(squares)
        self.y = torch.eye(self.size, self.y.shape[2], dtype=torch.float64).expand(len(runs), -1, -1)
        for run, values, count in zip(runs, squares.tolist(), real.sum(1).tolist(), strict=True):
            run.room = n - count
            run.trace = math.fsum(values)
            run.watch.pace.begin_anew()

    def _newest_gram(self) -> Tensor:
        return self.gram[:, -self._width :, -self._width :]

    def next_block(self, runs: list[Run], *, looked: bool) -> tuple[list[Run], Tensor, list[int]]:
        """Orthonormal rows of A' times the newest images, off the basis.

        Those for which half a step after a look is enough leave; the others are returned.
        """
        rows, longest, undo = _backward(runs, self.image[:, self.size - self._width : self.size], self._newest_gram())
        ends = [looked and run.watch.half_way(run.enough) for run in runs]
        for i, run in enumerate(runs):
            if ends[i]:
                run.factors = self._half_step(i, run, undo[i], rows[i])
        norm = [length * run.norm for length, run in zip(longest, runs, strict=True)]
        runs, stay = self.leave(runs, ends)
        if any(ends):
            rows, norm = rows[stay], [norm[i] for i in stay]
        return runs, *orthonormal(rows, self.basis[:, : self.size], norm, [run.room for run in runs])

    def _half_step(self, i: int, run: Run, undo: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of U U'A, half a step nearer than U S V': for A'u is known once the newest images are multiplied.

        A'u = s v + rest, the rest being what A' times the newest images' share of s u has off the basis.
        """
        left, s, right = self._factors(i)
        share = self.y[i, -self._width :, : len(s)].T / s[:, None]
        share = share if undo is None else share @ undo
        beyond = off(rows[None], self.basis[i : i + 1, : self.size])[0]
        rest = upload(share.float(), beyond.device) @ beyond
        across = (upload(s, beyond.device)[:, None] * right + rest).double()
        values, turn = torch.linalg.eigh((across @ across.T).cpu())
        t, turn = values.flip(0).clamp(min=0).sqrt(), turn.flip(1).T
        shrunk, turn = upload(turn / t[:, None], beyond.device), upload(turn, beyond.device)
        run.watch.half_step(t.tolist(), torch.linalg.vector_norm(turn @ rest.double(), dim=1).tolist())
        return (turn @ left.double()).float(), t.float(), (shrunk @ across).float()

    def leave_exhausted(self, runs: list[Run], which: list[bool]) -> tuple[list[Run], list[int]]:
        """Let those leave whose spaces are invariant: a last look sees the matrix itself, up to rounding."""
        for i, run in enumerate(runs):
            if which[i]:
                alone = self
                if len(runs) > 1:
                    alone = copy(self)
                    alone._keep([i])
                alone.look([run])
                run.watch.exhaust()
                run.factors = alone._factors(0)
        return self.leave(runs, which)

    def leave(self, runs: list[Run], ends: list[bool]) -> tuple[list[Run], list[int]]:
        """Hand factors to those that end and have none yet; returns the others, and where they stood."""
        stay = [i for i, end in enumerate(ends) if not end]
        if len(stay) == len(runs):
            return runs, stay
        for i, run in enumerate(runs):
            if ends[i]:
                run.factors = run.factors or self._factors(i)
        self._keep(stay)
        return [runs[i] for i in stay], stay

    def _keep(self, which: list[int]) -> None:
        """Only some of the matrices, in memory of their own."""
        self.basis, self.image = (_moved(rows, which, self.size) for rows in (self.basis, self.image))
        self.gram, self.y, self.s = self.gram[which], self.y[which], [self.s[i] for i in which]
        self.squares, self.vectors = self.squares[which], self.vectors[which]

    def _factors(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """u' (k, m), s (k,), v' (k, n) float32 of the last look; s on the host."""
        s = torch.tensor([value for value in self.s[i] if value > 0], dtype=torch.float64)
        y = self.y[i, :, : len(s)]
        seen, device = slice(0, len(y)), self.image.device
        left, right = upload((y / s).T.float(), device), upload(y.T.float(), device)
        return left @ self.image[i, seen], s.float(), right @ self.basis[i, seen]


def _moved(stack: Tensor, stay: list[int], size: int) -> Tensor:
    """Some of a stack in memory of their own; of their rows the first `size` count."""
    moved = torch.empty(len(stay), *stack.shape[1:], dtype=stack.dtype, device=stack.device)
    for to, i in enumerate(stay):
        moved[to, :size] = stack[i, :size]
    return moved
