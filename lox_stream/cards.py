"""A GPU as the pipeline sees it: its memory, and lanes of work that go side by side, with events between them.

A lane does what it is given in order, but not when it is given it. Whoever needs that something is done waits for an
event: a lane with `wait_for`, the host with `wait`. The tests put a card here whose lanes are as late, and as much
out of step with each other, as these promises allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a lane."""

    def wait(self) -> None:
        """Return once all is done that was given to the lane before this point."""


class Lane(Protocol):
    """Work in order. Its methods return at once; any thread may call them."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Between pinned memory of the host and the card's, either way."""

    def launch(self, work: Callable[[], None]) -> None:
        """Kernels that nobody fetches a number from."""

    def entered(self) -> AbstractContextManager[object]:
        """Within it, torch's work goes to this lane, and fetching a number waits for it."""

    def record(self) -> Event: ...

    def wait_for(self, event: Event) -> None:
        """What is given to this lane from now on begins after `event`."""


class Card(Protocol):
    """A GPU."""

    device: torch.device

    def lane(self) -> Lane: ...

    def pinned(self, n_bytes: int) -> Tensor:
        """(n_bytes,) uint8 of the host's memory that copies can run from and to by themselves."""

    def free_bytes(self) -> int:
        """Of the card's memory, that nobody uses."""

    def bound(self, n_bytes: int) -> None:
        """Take no more of the card's memory than so much from now on, what is kept for later included."""

    def trim(self) -> None:
        """Give back memory that is kept for later."""

    def close(self) -> None:
        """The same at the end, without a bound any more, and with what CUDA's libraries keep."""

    def entered(self) -> AbstractContextManager[object]:
        """Within it, this thread's tensors and kernels are this card's."""


class CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # a host that spins would take a core from the copies
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with self.entered():
            to.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], None]) -> None:
        with self.entered():
            work()

    @contextmanager
    def entered(self) -> Iterator[None]:
        # the device is set first: torch's context of a stream would go back to GPU 0, and set up its memory
        with torch.cuda.device(self.stream.device), torch.cuda.stream(self.stream):
            yield

    def record(self) -> CudaEvent:
        return CudaEvent(self.stream)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent), "lanes of one card wait for each other"
        self.stream.wait_event(event.event)


class CudaCard:
    """A CUDA GPU."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def lane(self) -> CudaLane:
        return CudaLane(self.device)

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def free_bytes(self) -> int:
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept

    def bound(self, n_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        most = torch.cuda.memory_reserved(self.device) + n_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), self.device)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def close(self) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # else they stay for ever
        torch.cuda.empty_cache()

    def entered(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)
