"""For all tests: memory that nobody wrote is poison, and tests that need a GPU are skipped where there is none.

torch is imported here only where a test module has imported it already, so the tests of planning start at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` and its kin, in every thread: NaN, the largest integer, or True, so that a hole shows."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
    places += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    for place, name in places:
        monkeypatch.setattr(place, name, poisoning(torch, getattr(place, name)))


@pytest.fixture
def one_thread():
    """torch as a worker has it, where bits are promised."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def poisoning(torch: Any, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """`allocate` whose tensors arrive full of poison."""

    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        made = allocate(*args, **kwargs)
        if made.device.type == "meta" or made.layout != torch.strided:
            return made  # holds no elements that could be read
        with torch.no_grad():
            if made.dtype == torch.bool:
                return made.fill_(True)
            if made.dtype.is_floating_point or made.dtype.is_complex:
                return made.fill_(float("nan"))
            return made.fill_(torch.iinfo(made.dtype).max)

    return poisoned


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} finds none"))
