"""LoX as a `Converter` of compressed-tensors and llm-compressor, so that it happens in the pass that quantises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_stream.errors import CheckpointError, OptionError
from lox_stream.hub import local
from lox_stream.matching import Step
from lox_stream.names import listing
from lox_stream.options import Options
from lox_stream.planning import DEFAULTS, plan
from lox_stream.reader import mapped, read_floats
from lox_stream.tensors import extrapolate_tensor


class LoxConverter:
    """Extrapolates the tensors of each shard on its way: `Converter` of compressed_tensors.entrypoints.convert.

    `aligned` is the model that is converted, `base` the one before alignment, folders or names on the hub; both are
    opened and held against each other here, with the errors of `plan`. A tensor comes out as `run` writes it; those
    that `run` copies stay as they are. Works on a shard at a time and on several of them at once, in any order.

        convert_checkpoint("aligned", "out", [LoxConverter("base", "aligned"), quantiser])
    """

    def __init__(self, base: str | Path, aligned: str | Path, *, options: Options = DEFAULTS) -> None:
        if options.form != "weights" or options.dtype != "same":
            raise OptionError("form and dtype are for the files that lox-stream writes, expected their defaults")
        made = plan(local(base), local(aligned), options=options)
        quantised = [step.name for step in made.steps if step.scaled is not None or step.base_scaled is not None]
        if quantised:
            raise CheckpointError(
                [f"{listing(quantised)}: are quantised, expected plain weights. Convert them first, and then with this"]
            )
        self._options, self._config = options, made.aligned.config
        self._steps = {step.name: step for step in made.steps if step.action == "extrapolate"}

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a shard, extrapolated where `run` does that."""
        return {name: self._extrapolated(name, tensor) for name, tensor in tensors.items()}

    def _extrapolated(self, name: str, tensor: Tensor) -> Tensor:
        step = self._steps.get(name)
        if step is None or tensor.is_meta:
            return tensor
        return extrapolate_tensor(step.seed_name, tensor, _base_of(step), options=self._options, config=self._config)

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names, shapes and dtypes of what `process` gives: those that come in."""
        return tensors

    def update_config(self, config: Any) -> Any:
        """The quantisation's config, which stays what it is."""
        return config

    def create_config(self) -> Any:
        """The same for compressed-tensors before 0.19."""
        return None

    def update_model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json, which stays what it is."""
        return config

    def get_dependencies(self, weight_name: str) -> set[str]:
        """Tensors of other shards that one needs: none, for base is opened here."""
        del weight_name
        return set()


def _base_of(step: Step) -> Tensor:
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    with mapped(step.base) as data:
        return read_floats(data, step.base).clone().to(torch.device("cpu"))
