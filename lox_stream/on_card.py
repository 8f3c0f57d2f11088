"""Matrices computed on GPUs: in through pinned memory, solved and updated there, out through pinned memory.

Several threads are in here at a time, each with a matrix of its own, so that one is copied in while others are solved
and a third is written. What they share is the card's memory, the slots and the lanes (`lending`). Two lanes compute:
while the host looks at the small matrices of one, the card multiplies for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from lox_stream.blocks import Blocks, Moves, Resident, Streamed
from lox_stream.card_delta import DeltaOnCard
from lox_stream.cards import Card, Lane
from lox_stream.costs import CARD_SHARE, bytes_on_card, goes_on_card
from lox_stream.delta import NotFinite
from lox_stream.errors import DeviceError
from lox_stream.kernels import GPUKernels, Run
from lox_stream.lending import Budget, Lanes
from lox_stream.samples import Sample
from lox_stream.update import (
    Emit,
    Matrix,
    Outcome,
    Outcomes,
    Outlet,
    Solved,
    UpdateAway,
    begin_away,
    factors_of,
    facts_of,
    solve_away,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPUTE_LANES = 2
LIBRARY_BYTES = 32 << 20  # that cuBLAS keeps for a thread in a lane, at most


class OnCard:
    """The computation on one card, within so many bytes of its memory."""

    def __init__(self, card: Card, memory_bytes: int, kernels: GPUKernels) -> None:
        self.card, self.kernels = card, kernels
        self.budget = Budget(memory_bytes)
        self._moves = Moves(card)
        self._computing = Lanes(card, COMPUTE_LANES)

    def close(self) -> None:
        """Give back the card's memory, once nobody is in here any more."""
        self.card.close()

    def extrapolate(self, matrix: Matrix, run: Run) -> Outcomes:
        """As `update.extrapolate_matrices` of one; raises DeviceError where the memory ends.

        The weights lie on the card where they fit. Else, and where the memory ends though they should, they go to it
        in blocks, for each product anew: the bits are the same.
        """
        begun = begin_away(matrix, run)
        if not isinstance(begun, Sample):
            return begun
        part, emitted = self.kernels.part_rows(*matrix.w1.shape), threading.Event()
        rows = 0 if self._bytes(matrix, 0) <= self.budget.n_bytes else self._block_rows(matrix, part)
        watched = replace(matrix, outlets=tuple(_noted(emitted, outlet) for outlet in matrix.outlets))
        try:
            with self.budget.held(self._bytes(matrix, rows), run):
                return self._extrapolate(watched, begun, rows, run)
        except RuntimeError as error:  # torch's own, or one of CUDA's libraries that got none
            problem = _ran_out(error)
            if not problem:
                raise
            if emitted.is_set():  # a byte is written once
                raise _no_memory(matrix, rows, problem) from error
        matrix.tell(
            f"the GPU ran out of memory ({problem}): the matrix went to it alone, in blocks, which takes longer. Leave "
            "room for others who use the GPU with --gpu-memory"
        )
        try:
            with self.budget.held(self.budget.n_bytes, run):  # nothing else of ours is on the card
                self.card.trim()
                self.budget.lower(int(self.card.free_bytes() * CARD_SHARE))  # what others took is not asked for again
                return self._extrapolate(matrix, begun, part, run)
        except RuntimeError as error:
            problem = _ran_out(error)
            if not problem:
                raise
            raise _no_memory(matrix, part, problem) from error

    def _bytes(self, matrix: Matrix, rows: int) -> int:
        m, n = matrix.w1.shape
        return bytes_on_card(m, n, matrix.setting.rank, (matrix.w1.element_size(), matrix.w0.element_size()), rows)

    def _block_rows(self, matrix: Matrix, part: int) -> int:
        """Rows of the largest blocks that fit: a whole number of parts."""
        if self._bytes(matrix, part) > self.budget.n_bytes:
            raise DeviceError(
                f"a matrix of {tuple(matrix.w1.shape)} takes {self._bytes(matrix, part)} bytes of GPU memory, expected "
                f"at most the {self.budget.n_bytes} that may be used: others took some since the run was planned. Go "
                "on with --resume when there is more"
            )
        rows = part
        while self._bytes(matrix, rows + part) <= self.budget.n_bytes:
            rows += part
        return rows

    def _extrapolate(self, matrix: Matrix, sample: Sample, rows: int, run: Run) -> Outcomes:
        """In blocks of so many rows; 0: with the weights on the card."""
        moves, w1, w0 = self._moves, matrix.w1, matrix.w0
        with self.card.entered(), self._all_done():
            resident = None if rows else Resident(moves, w1, w0, run)
            with self._computing.lent(run) as compute:
                if resident is not None:
                    compute.wait_for(resident.ready)
                blocks: Blocks = resident or Streamed(moves, w1, w0, rows, compute, run)
                with compute.entered():
                    op = DeltaOnCard(w1, w0, blocks, compute, self.kernels, self.card.device, run, rms=sample.delta_rms)
                    solved = solve_away(matrix, sample, op)
                    if not isinstance(solved, Solved):
                        compute.record().wait()
                        return solved
                    b, a = factors_of(solved, torch.float32)
                outcomes = []
                for outlet in matrix.outlets:
                    if outlet.take is not None:
                        with compute.entered():
                            outlet.take(b.cpu(), a.cpu())
                        outcomes.append(facts_of(solved, outlet, None))
                        continue
                    if resident is not None and resident.used:
                        resident.restore(w1, run)
                        compute.wait_for(resident.ready)
                    outcomes.append(self._update(solved, outlet, b, a, compute, blocks, run))
                return tuple(outcomes)

    def _update(
        self, solved: Solved, outlet: Outlet, b: torch.Tensor, a: torch.Tensor, compute: Lane, blocks: Blocks, run: Run
    ) -> Outcome:
        """One of the outputs, out of the weights as they are on the card."""
        moves, columns = self._moves, solved.matrix.w1.shape[1]
        resident = blocks if isinstance(blocks, Resident) else None
        with compute.entered():
            update = UpdateAway(solved, b, a, outlet, self.kernels)
        for block, there, _ in blocks.walk(both=False):
            compute.launch(update.of(block, there))
            if resident is None:
                moves.back.wait_for(compute.record())
                moves.move_out(there, _from(block.start * columns, outlet.emit), run)
        moves.back.wait_for(compute.record())
        outcome = update.facts(moves.fetched(update.sums))
        if resident is not None:
            resident.used = True
            if not isinstance(outcome, NotFinite):
                moves.move_out(resident.w1, outlet.emit, run)
        return outcome

    @contextmanager
    def _all_done(self) -> Iterator[None]:
        """After an error, wait: what is on its way must not find its memory in other hands. The first error counts."""
        try:
            yield
        except BaseException:
            for lane in (self._moves.into, *self._computing.all, self._moves.back):
                with suppress(RuntimeError):
                    lane.record().wait()
            raise


def _noted(emitted: threading.Event, outlet: Outlet) -> Outlet:
    """An outlet that is seen to be used."""

    def noting(at: int, tile: torch.Tensor) -> None:
        emitted.set()
        outlet.emit(at, tile)

    def taking(b: torch.Tensor, a: torch.Tensor) -> None:
        assert outlet.take is not None, "it takes factors"
        emitted.set()
        outlet.take(b, a)

    return replace(outlet, emit=noting, take=taking if outlet.take is not None else None)


def _no_memory(matrix: Matrix, rows: int, problem: str) -> DeviceError:
    return DeviceError(
        f"the GPU ran out of memory at a matrix of {tuple(matrix.w1.shape)}, in blocks of {rows} rows: {problem} "
        "Others may use it too. Use less with --gpu-memory and go on with --resume"
    )


def _ran_out(error: RuntimeError) -> str:
    """What an error says if it is about memory that ended."""
    text = (str(error).splitlines() or [""])[0]
    out = isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text
    return text.rstrip(".") + "." if out else ""


def _from(first: int, emit: Emit) -> Emit:
    """`emit` for a tensor that begins with the matrix's element `first`."""
    return lambda at, tile: emit(first + at, tile)


class Cards:
    """Cards of one kind: a matrix goes to the one that has the least to do."""

    def __init__(self, cards: Sequence[OnCard]) -> None:
        self._cards = tuple(cards)
        self._elements = [0] * len(cards)  # in work on each
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._cards)

    def bound(self, threads: int) -> None:
        """Hold torch to the budgets, where so many threads may come in here, whatever it keeps for later."""
        for card in self._cards:
            card.card.bound(card.budget.n_bytes + threads * COMPUTE_LANES * LIBRARY_BYTES)

    def takes(self, matrix: Matrix) -> bool:
        """Whether a matrix is computed on a card."""
        (m, n), setting = matrix.w1.shape, matrix.setting
        known = all(weight.dtype in DTYPES for weight in (matrix.w1, matrix.w0)) and matrix.dtype == matrix.w1.dtype
        return known and goes_on_card(m, n, setting.rank, setting.options.svd)

    def extrapolate(self, matrix: Matrix, run: Run) -> Outcomes:
        """`OnCard.extrapolate` on one of them."""
        with self._taken(matrix.w1.numel()) as card:
            return card.extrapolate(matrix, run)

    @contextmanager
    def _taken(self, elements: int) -> Iterator[OnCard]:
        with self._lock:
            index = self._elements.index(min(self._elements))
            self._elements[index] += elements
        try:
            yield self._cards[index]
        finally:
            with self._lock:
                self._elements[index] -= elements

    def close(self) -> None:
        """Give back the cards' memory, once nobody is in here any more."""
        for card in self._cards:
            card.close()
