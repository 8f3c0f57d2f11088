"""A GPU that is none: tensors of "cuda" compute on the CPU, do not mix with the host's, and fetches are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
FETCHES = {"cpu", "tolist", "item", "__float__", "__bool__", "__int__"}  # the host waits for these
MOVES = {"copy_"}  # between host and device
VIEWS = {"__getitem__", "view", "reshape", "numel", "element_size", "__get__", "T", "size", "dim", "stride"}  # no work


class OnGPU(torch.Tensor):
    """A tensor that says that it lies on a GPU."""


class PretendGPU(TorchFunctionMode):
    """While it is entered, in this thread; `fetches` counts how often the host waited for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = 0
        self.before_work: Callable[[], None] = lambda: None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        on_gpu = any(isinstance(value, OnGPU) for value in tensors)
        if func == torch.Tensor.device.__get__:
            return GPU if on_gpu else func(*args)
        if on_gpu and name not in VIEWS:
            self.before_work()
        if on_gpu and name not in MOVES:
            hosts = [value for value in tensors if not isinstance(value, OnGPU) and value.ndim]
            assert not hosts, f"{name} of a tensor on the GPU and one of the host"
        assert not (on_gpu and name == "numpy"), "a tensor on the GPU has no memory that NumPy sees"
        target = self._target(name, args, kwargs)
        if on_gpu and (name in FETCHES or (target is not None and target.type == "cpu")):
            self.fetches += 1
            on_gpu = False
        elif target is not None:
            on_gpu = target.type == "cuda"
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        made = func(*args, **kwargs)
        return tree_map(_tagged, made) if on_gpu and not isinstance(made, torch.Size) else made

    @staticmethod
    def _target(name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call names."""
        named = kwargs.get("device")
        if name == "to" and named is None:
            named = next((value for value in args[1:] if isinstance(value, torch.device | str)), None)
        return None if named is None else torch.device(named)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, OnGPU):
        return value.as_subclass(torch.Tensor)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _tagged(value: Any) -> Any:
    return value.as_subclass(OnGPU) if type(value) is torch.Tensor else value


def on_gpu(values: torch.Tensor) -> torch.Tensor:
    """The same memory, said to lie on the GPU."""
    return values.as_subclass(OnGPU)
