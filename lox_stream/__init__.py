"""lox-stream: low-rank extrapolation (LoX) of LLM weights, streamed.

    W_out = W_aligned + alpha * Proj_k(W_aligned - W_base)

`plan` looks at two checkpoints and decides, `extrapolate` writes the result, `stream` yields it tensor by tensor, and
`open` is a mapping that computes a tensor when it is asked for.
Names are loaded when they are first used: importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lox_stream.analysing import Analysis, analyze
    from lox_stream.anywhere import extrapolate
    from lox_stream.api import Progress, Summary, execute, execute_all
    from lox_stream.errors import (
        Cancelled,
        CheckpointError,
        DataError,
        DeviceError,
        InUseError,
        LoxError,
        MemoryBudgetError,
        OptionError,
        OutputError,
        ResumeError,
    )
    from lox_stream.finishing import finish
    from lox_stream.options import Options
    from lox_stream.planning import Plan, Step, plan, plan_all
    from lox_stream.streaming import Extrapolated, stream
    from lox_stream.streaming import Extrapolated as open  # noqa: F401  no part of `import *`
    from lox_stream.svd import TruncatedSVD, truncated_svd
    from lox_stream.tensors import extrapolate_tensor

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "Cancelled",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "Extrapolated",
    "InUseError",
    "LoxError",
    "MemoryBudgetError",
    "OptionError",
    "Options",
    "OutputError",
    "Plan",
    "Progress",
    "ResumeError",
    "Step",
    "Summary",
    "TruncatedSVD",
    "analyze",
    "execute",
    "execute_all",
    "extrapolate",
    "extrapolate_tensor",
    "finish",
    "plan",
    "plan_all",
    "stream",
    "truncated_svd",
]
_MODULES = {
    "analysing": ("Analysis", "analyze"),
    "anywhere": ("extrapolate",),
    "api": ("Progress", "Summary", "execute", "execute_all"),
    "finishing": ("finish",),
    "options": ("Options",),
    "planning": ("Plan", "Step", "plan", "plan_all"),
    "streaming": ("Extrapolated", "open", "stream"),
    "svd": ("TruncatedSVD", "truncated_svd"),
    "tensors": ("extrapolate_tensor",),
}
_HOME = dict.fromkeys([*__all__, "open"], "errors") | {
    name: module for module, names in _MODULES.items() for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = "Extrapolated" if name == "open" else name
    return getattr(importlib.import_module(f"lox_stream.{_HOME[name]}"), own)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "open"]
