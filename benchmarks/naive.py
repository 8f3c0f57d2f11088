"""The naive way, as the paper's script goes: everything in RAM, a full SVD of each delta. The one baseline of tests
and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def naive(w1: Tensor, w0: Tensor, rank: int, alpha: float) -> Tensor:
    """round(W1 + alpha * U_k S_k V_k) of two (m, n) weights: float32 difference, LAPACK's full SVD, one new tensor.

    Costs O(m n min(m, n)) and about six matrices in float32. Uses as many threads as torch is set to.
    """
    delta = w1.float() - w0.float()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    update = (u[:, :rank] * s[:rank]) @ vh[:rank]
    result: Tensor = (w1.float() + alpha * update).to(w1.dtype)
    return result
