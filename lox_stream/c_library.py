"""Functions of the C library that Python does not offer."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def c_function(name: str) -> Callable[..., int] | None:
    """The function, to be called with ctypes values; None where the system has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform != "win32" else None
