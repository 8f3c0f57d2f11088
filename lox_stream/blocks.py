"""The weights of a matrix on a GPU, as the computation walks over them: all at once, or block by block.

    map --host copies--> slots --lane into--> W1, W0           W_out --lane back--> slots --emit--> target

A block is some rows of both weights. Whatever the blocks are, the kernels give the same bits (`kernels.GPUKernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lox_stream.cards import Card, Event, Lane
from lox_stream.costs import SLOT_BYTES
from lox_stream.kernels import Run
from lox_stream.lending import Slots

Block = tuple[slice, Tensor, Tensor]  # rows of the matrix; W1 and W0 of these rows, on the card


class Blocks(Protocol):
    """A matrix's weights on a card."""

    def walk(self, *, both: bool = True) -> Iterator[Block]:
        """The blocks in order. What is launched in a lane while one is held finds it there; it is gone at the next.

        Unless `both` are asked for, only W1 of a block is there.
        """


class Moves:
    """Between the host's memory and the card's, by its two lanes for that; any thread may move."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.into, self.back = card.lane(), card.lane()
        self._slots_in, self._slots_out = Slots(card), Slots(card)

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory on the card. Earlier work of the lane `into` may use it still, but no other's."""
        with self.into.entered():
            return torch.empty(shape, dtype=dtype, device=self.card.device)

    def move_in(self, weight: Tensor, to: Tensor, run: Run) -> None:
        """Give the lane `into` a weight's copy to the card; both contiguous."""
        source, there = _bytes_of(weight), _bytes_of(to)

        def task(i: int) -> None:
            part = slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)
            with self._slots_in.lent() as slot:
                memory = slot.memory[: source[part].numel()]
                memory.copy_(source[part])
                self.into.copy(there[part], memory)
                slot.busy = self.into.record()

        run(task, -(-source.numel() // SLOT_BYTES))

    def move_out(self, out: Tensor, emit: Callable[[int, Tensor], None], run: Run) -> None:
        """Wait for the lane `back` to bring a tensor to the host, tile by tile into emit(first element, tile)."""
        source, size = _bytes_of(out), out.element_size()

        def task(i: int) -> None:
            part = slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES)
            with self._slots_out.lent() as slot:
                memory = slot.memory[: source[part].numel()]
                self.back.copy(memory, source[part])
                slot.busy = self.back.record()
                slot.busy.wait()
                emit(part.start // size, memory.view(out.dtype))

        run(task, -(-source.numel() // SLOT_BYTES))

    def fetched(self, numbers: Tensor) -> list[float]:
        """A few numbers of the card, by the lane `back`."""
        with self._slots_out.lent() as slot:
            memory = slot.memory[: numbers.numel() * numbers.element_size()].view(numbers.dtype)
            self.back.copy(memory, numbers)
            slot.busy = self.back.record()
            slot.busy.wait()
            found: list[float] = memory.tolist()
        return found


class Resident:
    """Both weights are on the card."""

    def __init__(self, moves: Moves, w1: Tensor, w0: Tensor, run: Run) -> None:
        self.w1, self.w0 = (moves.room(*weight.shape, dtype=weight.dtype) for weight in (w1, w0))
        self.used = False  # an output lies in the place of W1
        self._moves = moves
        moves.move_in(w1, self.w1, run)
        moves.move_in(w0, self.w0, run)
        self.ready = moves.into.record()

    def restore(self, w1: Tensor, run: Run) -> None:
        """Copy W1 again, once its output was moved out."""
        self._moves.move_in(w1, self.w1, run)
        self.ready, self.used = self._moves.into.record(), False

    def walk(self, *, both: bool = True) -> Iterator[Block]:
        del both
        yield slice(0, self.w1.shape[0]), self.w1, self.w0


class Streamed:
    """Blocks of so many rows are copied to the card in each walk: one while the one before is computed in a lane."""

    def __init__(self, moves: Moves, w1: Tensor, w0: Tensor, rows: int, compute: Lane, run: Run) -> None:
        self._moves, self._compute, self._run = moves, compute, run
        self._weights = w1, w0
        m, n = w1.shape
        self._blocks = [slice(top, min(top + rows, m)) for top in range(0, m, rows)]
        places = range(min(2, len(self._blocks)))
        self._rooms = [[moves.room(rows, n, dtype=weight.dtype) for weight in self._weights] for _ in places]
        self._used: list[Event | None] = [None for _ in places]

    def walk(self, *, both: bool = True) -> Iterator[Block]:
        for number, rows in enumerate(self._blocks):
            place = number % len(self._rooms)
            used = self._used[place]
            if used is not None:
                self._moves.into.wait_for(used)
            w1, w0 = (room[: rows.stop - rows.start] for room in self._rooms[place])
            self._moves.move_in(self._weights[0][rows], w1, self._run)
            if both:
                self._moves.move_in(self._weights[1][rows], w0, self._run)
            self._compute.wait_for(self._moves.into.record())
            yield rows, w1, w0
            self._used[place] = self._compute.record()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
