"""Operators over dense matrices."""

from __future__ import annotations

import torch


class Dense:
    """An operator over a dense matrix that counts its products."""

    def __init__(self, a):
        self.a = a.float()
        self.shape = tuple(a.shape)
        self.passes = 0

    def matmul(self, x):
        assert x.dtype == torch.float32
        self.passes += 1
        return self.a @ x

    def rmatmul(self, y):
        assert y.dtype == torch.float32
        self.passes += 1
        return self.a.T @ y

    def squared_norm(self):
        assert self.passes, "asked before the first product"
        return float(self.a.double().square().sum())


class OnePass(Dense):
    """The same with both products in one pass."""

    def normal(self, x):
        assert x.dtype == torch.float32
        self.passes += 1
        y = self.a @ x
        return y, self.a.T @ y
