"""Models of the zoo, changed a little, and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn


def moved(model: nn.Module) -> nn.Module:
    """The same with a little of rank three and noise added to every parameter."""
    generator = torch.Generator().manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = parameter.shape[0] if parameter.ndim else 1
            left = torch.randn(rows, 3, generator=generator)
            right = torch.randn(3, parameter.numel() // rows, generator=generator)
            change = left @ right + 0.1 * torch.randn(rows, parameter.numel() // rows, generator=generator)
            parameter += 0.01 * change.view(parameter.shape)
    return model


def loaded(kind: type, folder: Path) -> nn.Module:
    """The model, of which no key may be missing or left over."""
    if kind.__module__.startswith("diffusers"):
        model, told = kind.from_pretrained(folder, output_loading_info=True)
    else:
        model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(told.values()), told
    return model.float()
