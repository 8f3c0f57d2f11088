"""config.json of an output that has other dtypes than aligned."""

from __future__ import annotations

import json
from typing import Any

from lox_stream.checkpoint import Checkpoint
from lox_stream.scales import QUANTISED

CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers from 4.56 on, and before
FLOATS = ("float64", "float32", "float16", "bfloat16")


def config_for(model: Checkpoint, dtype: str) -> bytes | None:
    """The model's config.json with its dtypes replaced, those of its parts too, and not quantised; None without one.

    Loaders that are told nothing take the weights in the dtype that stands there.
    """
    if not model.config:
        return None
    return json.dumps(_with_dtype(model.config, dtype), indent=2, ensure_ascii=False).encode() + b"\n"


def _with_dtype(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in DTYPE_KEYS and value in FLOATS else _with_dtype(value, dtype)
        for key, value in config.items()
        if key not in QUANTISED
    }
