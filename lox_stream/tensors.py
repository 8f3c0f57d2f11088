"""One tensor out of two that lie in memory: what toolchains call that have a loop over tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_stream.checkpoint import TensorInfo
from lox_stream.delta import NotFinite
from lox_stream.errors import DataError, OptionError
from lox_stream.fused import parts_of
from lox_stream.kinds import stack_of
from lox_stream.matching import Step, decide
from lox_stream.names import printable
from lox_stream.options import Options, check_options, options_for, thread_count
from lox_stream.outcomes import setting_of
from lox_stream.planning import DEFAULTS
from lox_stream.quantisation import FLOATS
from lox_stream.reader import TORCH_DTYPES, grouped, matrix_of
from lox_stream.regions import regions_of
from lox_stream.update import Matrix, Outlet, extrapolate_matrices
from lox_stream.workers import Workers

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def extrapolate_tensor(
    name: str,
    aligned: Tensor,
    base: Tensor,
    *,
    options: Options = DEFAULTS,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """The tensor that `run` writes under this name, bit by bit: aligned + alpha * Proj_k(aligned - base).

    Both of one shape, of any strides and devices, of float64, float32, float16 or bfloat16; the result has the dtype
    and the device of `aligned`. The name says what the tensor is (a matrix, a stack of experts, a vector that is
    copied), and which rule of `options.recipe` counts; `config` is the model's config.json, for the few models whose
    shapes do not tell. Computed on the CPU, by `options.threads` threads of its own; any thread may call it, with no
    effect on torch's settings. What is no matrix, is skipped, or is the same on both sides is `aligned` itself.

    Raises OptionError for options that mean nothing and tensors that do not fit, DataError for NaN or Inf (with
    `on_nonfinite="copy"` the result is `aligned`).

        from lox_stream import extrapolate_tensor

        w = extrapolate_tensor("model.layers.0.mlp.up_proj.weight", w_aligned, w_base)
    """
    check_options(options)
    if (options.dtype, options.form) != ("same", "weights"):
        raise OptionError(
            f"dtype is {options.dtype!r} and form {options.form!r}, expected 'same' and 'weights' for one tensor. Cast "
            "both to the dtype that is wanted: that gives what `run --dtype` writes"
        )
    for side, tensor in (("aligned", aligned), ("base", base)):
        if not isinstance(tensor, Tensor):
            raise OptionError(f"{printable(name)}: {side} is a {type(tensor).__name__}, expected a torch tensor")
    if aligned.shape != base.shape:
        raise OptionError(
            f"{printable(name)}: aligned is {tuple(aligned.shape)}, base {tuple(base.shape)}; expected one shape. Of a "
            "vocabulary that grew give the rows that both have"
        )
    if aligned.is_meta or base.is_meta or decide(_info(name, aligned), options) != "matrix":
        return aligned
    for side, tensor in (("aligned", aligned), ("base", base)):
        if NAMES.get(tensor.dtype) not in FLOATS:
            raise OptionError(
                f"{printable(name)}: dtype of {side} is {tensor.dtype}, expected float64, float32, float16 or bfloat16"
            )
    with Workers(thread_count(options)) as workers:
        made = workers.call(lambda: _extrapolated(name, aligned, base, options, config or {}, workers))
    return aligned if made is None else made.to(aligned.device)


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, NAMES.get(tensor.dtype, ""), tuple(tensor.shape), Path(), 0, tensor.nbytes)


def _extrapolated(
    name: str, aligned: Tensor, base: Tensor, options: Options, config: Mapping[str, Any], workers: Workers
) -> Tensor | None:
    """None where nothing changes."""
    count, m, n = stack_of(name, tuple(aligned.shape), config)
    own = options_for(name, options)
    parts = parts_of(name, m, n, config) if own.split_fused else ()
    infos = _info(name, aligned), _info(name, base)
    step = Step(name, *infos, "extrapolate", "matrix", own.rank, count, m, n, name, parts)
    w1, w0 = (tensor.detach().cpu().contiguous().view(-1) for tensor in (aligned, base))
    out, changed = w1.clone(), False
    for region in regions_of(step):
        there = grouped(out[region.start : region.start + region.span], region)
        made = torch.empty(region.m * region.n, dtype=out.dtype)

        def emit(first: int, tile: Tensor, made: Tensor = made) -> None:
            made[first : first + tile.numel()] = tile.reshape(-1)

        setting = setting_of(step, options, region)
        matrix = Matrix(matrix_of(w1, region), matrix_of(w0, region), setting, (Outlet(own.alpha, emit),))
        ((outcome,),) = extrapolate_matrices([matrix], workers.run)
        if isinstance(outcome, NotFinite):
            if options.on_nonfinite == "copy":
                return None
            raise DataError(f"{printable(name)}: {outcome}; expected finite numbers") from outcome
        if outcome.method != "zero":
            there.copy_(made.view(there.shape))
            changed = True
    return out.view(aligned.shape) if changed else None
