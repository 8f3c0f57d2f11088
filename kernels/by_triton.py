"""The operations on weights of a GPU in Triton: each is a file in `gpu`. Imported only where a GPU computes."""

from typing import Any

from torch import Tensor

from .gpu import lowrank_update as update
from .gpu.delta_matmul import delta_matmul
from .gpu.delta_rmatmul import partial_products
from .gpu.partial_sums import total
from .gpu.products import part_rows

__all__ = ["delta_matmul", "lowrank_update", "part_rows", "partial_products", "total"]


def lowrank_update(w1: Tensor, us: Tensor, vh: Tensor, out: Tensor, *, whole: int | None = None, **how: Any) -> Tensor:
    """`gpu.lowrank_update`: a tile is the same in a matrix of any height."""
    del whole
    return update.lowrank_update(w1, us, vh, out, **how)
