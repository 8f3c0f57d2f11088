"""The float64 oracle: what LoX gives when nothing but the last step rounds, and what the paper's script gives.

It shares no code with lox_stream: full SVD by LAPACK in float64, one rounding to the output's dtype. The tests and
the benchmarks judge by it. Costs a full SVD of each matrix (about two minutes for 135M parameters on two cores).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}


class Weights:
    """The tensors of a safetensors folder by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                shards = dict.fromkeys(file.keys(), "model.safetensors")
        self._paths = {name: folder / shard for name, shard in shards.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `values` to the nearest `dtype`, ties to even, in one rounding.

    torch goes from float64 to bfloat16 through float32 and rounds twice. Here the way through float32 rounds to odd
    (Boldo and Melquiond 2008): cut, and set the last bit where something was lost, which later rounding respects.
    """
    if dtype == torch.float64:
        return values.clone()
    exact = values.numpy()
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(exact.astype(np.float16))  # numpy rounds this once
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    if dtype == torch.float32:
        return torch.from_numpy(near)
    bits = near.view(np.int32)
    bits -= (np.abs(near.astype(np.float64)) > np.abs(exact)).astype(np.int32)  # away from zero: one back, a cut
    bits |= (near.astype(np.float64) != exact).astype(np.int32)
    return torch.from_numpy(near).to(torch.bfloat16)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring `dtype` numbers at the magnitude of each of float64 `values`."""
    exponent = torch.frexp(values.abs().clamp(min=torch.finfo(dtype).smallest_normal)).exponent
    return torch.ldexp(torch.ones_like(values), exponent - 1 - FRACTION_BITS[dtype])


@dataclass(frozen=True, slots=True)
class Exact:
    """The leading triplets of delta (m, n) in float64, and all of its singular values."""

    us: Tensor  # (m, k), columns of U times S
    vh: Tensor  # (k, n)
    singular_values: Tensor  # (min(m, n),)
    gap: float  # (s_k - s_(k+1)) / s_k; 1.0 where there is no s_(k+1), 0.0 where s_k is zero

    def update(self, alpha: float) -> Tensor:
        """alpha * rank-k part, (m, n) float64."""
        return alpha * (self.us @ self.vh)


def decompose(w1: Tensor, w0: Tensor, rank: int) -> Exact:
    """Full LAPACK SVD (gesdd) of `w1 - w0`, both (m, n), in float64; the difference of two bf16 numbers is exact."""
    u, s, vh = torch.linalg.svd(w1.double() - w0.double(), full_matrices=False)
    gap = 1.0 if rank >= len(s) else float((s[rank - 1] - s[rank]) / s[rank - 1]) if s[rank - 1] > 0 else 0.0
    return Exact(u[:, :rank] * s[:rank], vh[:rank], s, gap)


def authors_output(w1: Tensor, w0: Tensor, rank: int, alpha: float) -> Tensor:
    """The arithmetic of the paper's script: bf16 difference, float32 full SVD and sum, one rounding at the end."""
    u, s, vh = torch.linalg.svd((w1 - w0).float(), full_matrices=False)
    s[rank:] = 0
    result: Tensor = w1.float() + alpha * (u @ torch.diag(s) @ vh)
    return result.to(w1.dtype)


def same_bits(a: Tensor, b: Tensor) -> int:
    """How many elements of two tensors of one shape and dtype hold the same bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(f"{tuple(a.shape)} {a.dtype} cannot be compared with {tuple(b.shape)} {b.dtype}")
    return int((a.view(BITS[a.dtype]) == b.view(BITS[b.dtype])).sum())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one tensor of an output agrees with the oracle.

    Differences are counted in ulps at the magnitude of |W1| or of the exact result, the larger one. Where both are far
    below the matrix's updates (tokens that the base never used), no float32 program keeps an ulp: LAPACK's full SVD is
    up to 12 off in 10 of 135 million elements. So `worst_ulps` counts at no less than the largest update of the matrix,
    and `beyond` says how many elements are more than one ulp off without that floor.
    """

    name: str
    elements: int
    same: int
    gap: float  # of a matrix; 1.0 of a vector
    worst_ulps: float
    beyond: int

    @property
    def share(self) -> float:
        return self.same / self.elements


def agreement(name: str, w1: Tensor, w0: Tensor, out: Tensor, rank: int, alpha: float) -> Agreement:
    """Compare `out` with the exact result. A vector has to be a copy of `w1`."""
    if w1.ndim < 2:
        return Agreement(name, w1.numel(), same_bits(w1, out), 1.0, 0.0, 0)
    exact = decompose(w1, w0, rank)
    update = exact.update(alpha)
    result = w1.double() + update
    right = rounded_once(result, w1.dtype)
    magnitude = torch.maximum(w1.double().abs(), result.abs())
    off = (out.double() - right.double()).abs()
    beyond = int((off > ulp(magnitude, w1.dtype)).sum())
    worst = float((off / ulp(magnitude.clamp(min=update.abs().max()), w1.dtype)).max())
    return Agreement(name, w1.numel(), same_bits(right, out), exact.gap, worst, beyond)


def agreements(base: Path, aligned: Path, out: Path, rank: int, alpha: float) -> list[Agreement]:
    """`agreement` for every tensor of the aligned checkpoint."""
    w0, w1, result = Weights(base), Weights(aligned), Weights(out)
    return [agreement(name, w1[name], w0[name], result[name], rank, alpha) for name in w1]
