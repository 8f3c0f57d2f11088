"""Some elements of a weight, which tell its size and how coarse its grid is: what of an output an error would flip."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SAMPLED_RUNS, SAMPLED_RUN = 128, 64  # of consecutive elements
BOUND = 1100  # of the exponents of all float64 numbers; zero counts as under the lowest
MEAN_OF_NORMAL = math.sqrt(2 / math.pi)  # mean |x| / rms x
UNDER_UPDATE = 3.0  # flips where |W1| is below the update's rms, against those at its grid: the update may be small too
FLOAT32_EPS = torch.finfo(torch.float32).eps


class Sample:
    """Some elements of W1 and delta at fixed places: sizes, and how coarse the grid of the output's `dtype` is."""

    def __init__(self, w1: Tensor, w0: Tensor, dtype: torch.dtype) -> None:
        wide = torch.float64 if torch.float64 in (w1.dtype, w0.dtype) else torch.float32
        some = _some(w1).to(wide)
        delta = some - _some(w0).to(wide)
        self.delta_rms = norm_of(delta) / math.sqrt(delta.numel())
        self.weight_norm = norm_of(some) * math.sqrt(w1.numel() / some.numel())
        finfo = torch.finfo(dtype)
        self._eps, self._tiny = finfo.eps, finfo.tiny
        values = some.numpy()
        exponents = np.where(values == 0, -BOUND, np.frexp(values)[1]).clip(-BOUND, BOUND)  # of NaN: anything
        lowest = int(exponents.min())
        counts = np.bincount(exponents - lowest).tolist()
        self._exponents: list[tuple[int, float]] = [
            (lowest + e, count / some.numel()) for e, count in enumerate(counts) if count
        ]

    def share(self, error_rms: float, update_rms: float) -> float:
        """Predicted share of output elements that `error_rms` moves to another value.

        An error e flips an element with probability |e| / ulp, ulp being the spacing of the output's dtype at
        max(|W1|, update), finer below that (UNDER_UPDATE); e is taken as normal and independent of W1. The second term
        is what float32 arithmetic alone does, for a float64 oracle as well.
        """
        finest = math.frexp(self._tiny)[1]
        lowest = max(math.frexp(update_rms)[1], finest)
        finer = min(UNDER_UPDATE, 1 + 0.4 * (lowest - finest))  # 0.4 for each binade below, down to the subnormals
        error = MEAN_OF_NORMAL * error_rms / self._eps
        flips: float = sum(
            part * min(1.0, error * 2.0 ** (1 - max(e, lowest)) * (1.0 if e >= lowest else finer))
            for e, part in self._exponents
        )
        return flips + 0.5 * FLOAT32_EPS / self._eps


def _some(weight: Tensor) -> Tensor:
    """Short runs at even distances: an element here and there would cost a page fault and a line of the cache each."""
    flat = weight.reshape(-1)
    runs, length = _runs(flat.numel())
    return flat.as_strided((runs, length), (flat.numel() // runs, 1)).reshape(-1)


def places(count: int) -> Tensor:
    """The indices of the elements that a sample of `count` looks at."""
    runs, length = _runs(count)
    return (torch.arange(runs)[:, None] * (count // runs) + torch.arange(length)).view(-1)


def _runs(count: int) -> tuple[int, int]:
    runs = min(SAMPLED_RUNS, -(-count // SAMPLED_RUN))
    return runs, min(SAMPLED_RUN, count // runs)


def norm_of(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
