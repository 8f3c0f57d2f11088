"""A kernel launch as data: launched on a GPU, interpreted on a CPU, or compiled where there is no GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


Arguments = Mapping[str, Tensor | int | float]

_launching = threading.Lock()  # Triton compiles and loads a kernel at its first launch, and not for two threads at once


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel, its grid, what it is given, and how it is compiled."""

    kernel: Any  # of triton.jit
    grid: tuple[int, ...]
    arguments: Arguments
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    most_registers: int | None = None  # of a thread; None: the assembler weighs them against blocks a processor

    def __call__(self) -> None:
        with _launching:
            self.kernel[self.grid](**self._given())

    def compiled(self) -> Any:
        """Triton's compiled kernel for the active driver's device, not launched; the tensors may be on `meta`."""
        return self.kernel.run(grid=self.grid, warmup=True, **self._given())

    def _given(self) -> dict[str, object]:
        return {
            **self.arguments,
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.most_registers,
            "enable_fp_fusion": True,  # said because Triton's default changed in 3.10, and the bits with it
        }


def power_of_two_over(count: int, least: int = 1) -> int:
    """The smallest power of two that is `count` and `least` or more.

    >>> power_of_two_over(6, 16), power_of_two_over(33)
    (16, 64)
    """
    return max(least, 1 << (count - 1).bit_length())


def tiles_of(length: int, tile: int) -> int:
    """How many tiles cover a length."""
    return -(-length // tile)


def check_weights(w1: Tensor, w0: Tensor) -> None:
    """What every kernel here asks of a pair."""
    assert w1.ndim == 2, "a weight is a matrix here"
    assert w1.shape == w0.shape, "base and aligned differ in shape"
    assert w1.device == w0.device, "base and aligned are on two devices"
    for weight in (w1, w0):
        assert weight.dtype in FLOATS, f"a weight is {weight.dtype}, expected one of {FLOATS}"
        assert weight.stride(1) == 1 or weight.shape[1] == 1, "rows have to be contiguous"


def signed32(word: int) -> int:
    """A 32-bit word as the int32 of its bits, the type in which a kernel takes it whatever its value.

    >>> signed32(0xFFFFFFFF), signed32(7)
    (-1, 7)
    """
    return word - (1 << 32) if word >= 1 << 31 else word
