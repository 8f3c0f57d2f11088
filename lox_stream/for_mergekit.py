"""LoX as a merge method of mergekit, and the command `lox-mergekit`: mergekit's own, with the method registered."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lox_stream.errors import LoxError, OptionError
from lox_stream.installed import way_to
from lox_stream.names import printable
from lox_stream.options import Options
from lox_stream.tensors import extrapolate_tensor

MISSING = (
    "mergekit is not installed, or of a version that does not fit; expected it. Install it, which is the extra "
    "[mergekit]: " + way_to("mergekit")
)


def lox_method() -> Any:
    """The merge method `lox`, of `mergekit.merge_methods`: its base_model and one other model, the aligned one.

    Parameters `rank` (6) and `alpha` (1.25), for the whole merge or by filters as mergekit has them. Computed on the
    CPU. Raises LoxError where mergekit is missing.
    """
    try:
        from mergekit.merge_methods import BasePolicy, InputContract, OptionalTensorPolicy, TensorGroup, merge_method
    except ImportError as error:
        raise LoxError(f"{MISSING}\nPython says: {error}") from error

    def lox(group: TensorGroup, rank: int = 6, alpha: float = 1.25) -> torch.Tensor:
        base, aligned = group.base.tensor, group.non_base[0].tensor
        if base.shape != aligned.shape:
            name = printable(group.metadata.name)
            raise OptionError(
                f"{name}: aligned is {tuple(aligned.shape)}, base {tuple(base.shape)}; expected one shape. Let "
                "mergekit make the vocabularies agree (tokenizer: source: base)"
            )
        return extrapolate_tensor(group.metadata.name, aligned, base, options=Options(rank=rank, alpha=alpha))

    lox.__annotations__ |= {"group": TensorGroup, "rank": int, "alpha": float, "return": torch.Tensor}
    return merge_method(
        name="lox",
        pretty_name="LoX (low-rank extrapolation)",
        reference_url="https://arxiv.org/abs/2506.15606",
        optional_tensor_policy=OptionalTensorPolicy.ERROR,
        uses_accelerator=False,
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
    )(lox)


def main() -> None:
    """The console script: `mergekit-yaml` that knows the method `lox`."""
    try:
        method = lox_method()
    except LoxError as error:
        sys.exit(f"error: {error}")
    from mergekit.merge_methods import register
    from mergekit.scripts.run_yaml import main as run_yaml

    register(method)
    run_yaml(prog_name="lox-mergekit")
