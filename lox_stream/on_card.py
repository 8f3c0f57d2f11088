"""Matrices computed on a GPU: in through pinned memory, solved and updated there, out through pinned memory.

    map --host copies--> slots --lane in--> W1, W0 --lane compute--> W_out --lane out--> slots --emit--> target

Several threads are in here at a time, each with a matrix of its own, so that one is copied in while another is solved
and a third is written. What they share is the card's memory, by `Budget`, the slots, and the compute lane, which solves
one matrix at a time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_stream.cards import Card, Event
from lox_stream.costs import SLOT_BYTES, SLOTS, bytes_on_card, goes_on_card
from lox_stream.delta import NotFinite
from lox_stream.errors import DeviceError
from lox_stream.facts import MatrixFacts
from lox_stream.kernels.cpu import Retained, Run
from lox_stream.update import Matrix, Solved, facts_of, solve_away, update_away

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Slots:
    """Pinned memory that is lent out: a slot is ready once the last copy from or to it is done."""

    def __init__(self, card: Card) -> None:
        self._free: queue.SimpleQueue[tuple[Tensor, Event | None]] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._free.put((card.pinned(SLOT_BYTES), None))

    @contextmanager
    def lent(self) -> Iterator[Loan]:
        memory, busy = self._free.get()
        loan = Loan(memory, None)
        try:
            if busy is not None:
                busy.wait()
            yield loan
        finally:
            self._free.put((memory, loan.busy))


@dataclass(slots=True)
class Loan:
    """A slot; `busy` is the event after which it may be used again."""

    memory: Tensor
    busy: Event | None


class Budget:
    """So many bytes of the card's memory; whoever asks for more than is left waits."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = self._left = n_bytes
        self._changed = threading.Condition()

    @contextmanager
    def held(self, n_bytes: int, run: Run) -> Iterator[None]:
        """Raises Cancelled where `run` does so while this waits, DeviceError where it would wait for ever."""
        if n_bytes > self.n_bytes:
            raise DeviceError(
                f"a matrix takes {n_bytes} bytes of GPU memory, expected at most the {self.n_bytes} that may be used: "
                "others took some since the run was planned. Go on with --resume when there is more"
            )
        with self._changed:
            while self._left < n_bytes:
                run(lambda _: None, 1)
                self._changed.wait(timeout=0.1)
            self._left -= n_bytes
        try:
            yield
        finally:
            with self._changed:
                self._left += n_bytes
                self._changed.notify_all()


def _needed(matrix: Matrix) -> int:
    m, n = matrix.w1.shape
    return bytes_on_card(m, n, matrix.setting.rank, (matrix.w1.element_size(), matrix.w0.element_size()))


class OnCard:
    """The computation on one card, within so many bytes of its memory."""

    def __init__(self, card: Card, memory_bytes: int) -> None:
        self.card = card
        self.budget = Budget(memory_bytes)
        self._into, self._compute, self._back = card.lane(), card.lane(), card.lane()
        self._slots_in, self._slots_out = Slots(card), Slots(card)
        self._solving = threading.Lock()

    def takes(self, matrix: Matrix) -> bool:
        """Whether a matrix is computed on the card."""
        (m, n), setting = matrix.w1.shape, matrix.setting
        known = all(weight.dtype in DTYPES for weight in (matrix.w1, matrix.w0))
        return known and goes_on_card(m, n, setting.rank, setting.options.svd)

    def close(self) -> None:
        """Give back the card's memory, once nobody is in here any more."""
        self.card.close()

    def extrapolate(self, matrix: Matrix, run: Run) -> MatrixFacts | NotFinite:
        """As `update.extrapolate_matrix`, but NotFinite is returned; DeviceError where the memory ends."""
        try:
            return self._extrapolate(matrix, run)
        except torch.cuda.OutOfMemoryError as problem:
            raise DeviceError(
                f"the GPU ran out of memory at a matrix of {tuple(matrix.w1.shape)}: {str(problem).splitlines()[0]} "
                "Others may use it too. Use less with --gpu-memory and go on with --resume"
            ) from problem

    def _extrapolate(self, matrix: Matrix, run: Run) -> MatrixFacts | NotFinite:
        with self.card.entered(), self.budget.held(_needed(matrix), run), self._all_done():
            w1, w0 = self._moved_in(matrix.w1, run), self._moved_in(matrix.w0, run)
            ready = self._into.record()
            with self._solving:
                self._compute.wait_for(ready)
                with self._compute.entered():
                    solved = solve_away(matrix, w1, w0, run)
                    if not isinstance(solved, Solved):
                        ready.wait()  # perhaps no number was fetched yet
                        return solved
                    out, sums = torch.empty_like(w1), torch.empty(3, dtype=torch.float64, device=w1.device)
                self._compute.launch(update_away(solved, w1, out, sums))
                done = self._compute.record()
            self._back.wait_for(done)
            outcome = facts_of(solved, self._fetched(sums))
            if not isinstance(outcome, NotFinite):
                self._moved_out(out, matrix, run)
            return outcome

    @contextmanager
    def _all_done(self) -> Iterator[None]:
        """After an error, wait: what is on its way must not find its memory in other hands."""
        try:
            yield
        except BaseException:
            for lane in (self._into, self._compute, self._back):
                lane.record().wait()
            raise

    def _moved_in(self, weight: Tensor, run: Run) -> Tensor:
        """A weight's copy on the card, on its way there; the lane `into` knows when it has arrived."""
        with self._into.entered():  # its memory may be in use by this lane's earlier work, but by no other's
            away = torch.empty(weight.shape, dtype=weight.dtype, device=self.card.device)
        source, to = _bytes_of(weight), _bytes_of(away)

        def task(i: int) -> None:
            part = slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)
            with self._slots_in.lent() as slot:
                memory = slot.memory[: source[part].numel()]
                memory.copy_(source[part])
                self._into.copy(to[part], memory)
                slot.busy = self._into.record()

        run(task, -(-source.numel() // SLOT_BYTES))
        return away

    def _fetched(self, sums: Tensor) -> Retained:
        with self._slots_out.lent() as slot:
            memory = slot.memory[: sums.numel() * sums.element_size()].view(sums.dtype)
            self._back.copy(memory, sums)
            slot.busy = self._back.record()
            slot.busy.wait()
            dot, square, bad = memory.tolist()
        return Retained(dot, square, bad == 0)

    def _moved_out(self, out: Tensor, matrix: Matrix, run: Run) -> None:
        source, size = _bytes_of(out), out.element_size()

        def task(i: int) -> None:
            part = slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)
            with self._slots_out.lent() as slot:
                memory = slot.memory[: source[part].numel()]
                self._back.copy(memory, source[part])
                slot.busy = self._back.record()
                slot.busy.wait()
                matrix.emit(part.start // size, memory.view(out.dtype))

        run(task, -(-source.numel() // SLOT_BYTES))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
