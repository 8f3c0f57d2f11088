"""What extrapolation gives, in float64 by LAPACK; for the laws of whole runs."""

from __future__ import annotations

import torch
from torch import Tensor


def extrapolated(w1: Tensor, w0: Tensor, rank: int, alpha: float) -> Tensor:
    """W1 + alpha * rank-k part of W1 - W0 of matrices (m, n), or of stacks of them (c, m, n); float64."""
    u, s, vh = torch.linalg.svd(w1.double() - w0.double(), full_matrices=False)
    return w1.double() + alpha * (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
