"""Whether Triton works on a GPU: it compiles with tools of the machine, a C compiler among them, when first asked."""

from __future__ import annotations

import torch


def why_not(device: torch.device) -> str:
    """What keeps Triton from working on a GPU, in words; nothing where it works: a small product is right."""
    try:
        from .delta_matmul import delta_matmul

        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
        product = delta_matmul(2 * ones, ones, torch.ones(64, 16, device=device))
    except Exception as problem:  # of a compiler, a linker or the driver: whatever it is, there is no way on
        return f"{type(problem).__name__}: {(str(problem).splitlines() or ['no reason'])[0]}"
    return "" if bool((product == 64).all()) else "a product of ones is wrong"
