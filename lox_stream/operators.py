"""What a solver asks of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOAT32_SCALE, FLOAT64_SCALE = 120, 1000  # exponents of the largest scales that leave such numbers finite

Normal = Callable[[Tensor], tuple[Tensor, Tensor]]


class Operator(Protocol):
    """A matrix (m, n) that can be multiplied. All tensors are float32.

    It may have a method `normal(x)` that gives y = A @ x and A.T @ y, (n, l) -> (m, l) and (n, l), in one pass; and
    a `device`, on which its products take and leave their tensors. Without one that is the CPU.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def matmul(self, x: Tensor) -> Tensor:
        """A @ x: (n, l) -> (m, l)."""

    def rmatmul(self, y: Tensor) -> Tensor:
        """A.T @ y: (m, l) -> (n, l)."""

    def squared_norm(self) -> float:
        """|A|_F^2. Asked for after the first product, so that it can be taken on the way."""


def device_of(op: Operator) -> torch.device:
    """Where its products take and leave their tensors."""
    return getattr(op, "device", torch.device("cpu"))


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host where it is needed. This waits for a lane that has nothing to do, after a fetch."""
    return values.to(device)


@dataclass(frozen=True, slots=True)
class Turned:
    """A.T of an operator."""

    op: Operator

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.op.shape
        return n, m

    @property
    def device(self) -> torch.device:
        return device_of(self.op)

    def matmul(self, x: Tensor) -> Tensor:
        return self.op.rmatmul(x)

    def rmatmul(self, y: Tensor) -> Tensor:
        return self.op.matmul(y)

    def squared_norm(self) -> float:
        return self.op.squared_norm()


def power_of_two(size: float, limit: int) -> float:
    """1.0 for entries of an ordinary size, else the power of two, up to 2^limit, that brings `size` to about 1."""
    if not math.isfinite(size) or size == 0.0 or 2.0**-24 < size < 2.0**24:
        return 1.0
    return 2.0 ** max(-limit, min(limit, -math.frexp(size)[1]))
