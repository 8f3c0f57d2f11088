"""Weights of FP8 and the scales beside them: W = q * scale, one scale for a block of the matrix, a row, or all of it.

Conventions differ in names and block sizes alone: DeepSeek's `weight_scale_inv` for blocks of 128 x 128 (a factor, for
all its name), and `weight_scale` of compressed-tensors, fbgemm and ModelOpt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo, model_of

WEIGHTS = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16")
SUFFIXES = ("_scale_inv", "_scale")  # of a scale's name, behind its weight's
QUANTISED = ("quantization_config", "compression_config")  # keys of a config
ACTIVATIONS = ("*.input_scale", "*.output_scale", "*.[qkv]_scale", "*.prob_scale")  # scales of what flows through
BLOCK = (128, 128)  # where a config does not tell


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of an (m, n) matrix that share a scale: `rows` x `columns` each, at the edges what is left."""

    rows: int
    columns: int

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """How many there are, down and across."""
        return -(-m // self.rows), -(-n // self.columns)


def blocks_of(shape: tuple[int, int], scale_shape: tuple[int, ...], config: Mapping[str, Any]) -> Blocks | None:
    """The blocks of a weight with scales of such a shape; None where the two do not go together.

    >>> blocks_of((256, 300), (2, 3), {}), blocks_of((256, 300), (256, 1), {}), blocks_of((256, 300), (), {})
    (Blocks(rows=128, columns=128), Blocks(rows=1, columns=300), Blocks(rows=256, columns=300))
    """
    m, n = shape
    if math.prod(scale_shape) == 1:
        return Blocks(m, n)
    if scale_shape in ((m,), (m, 1)):
        return Blocks(1, n)
    blocks = Blocks(*_block_size(config))
    return blocks if scale_shape == blocks.grid(m, n) else None


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """What config.json says: `weight_block_size`, or `block_structure` of a group of compressed-tensors."""
    for said in _said(config):
        for size in (said.get("weight_block_size"), *(scheme.get("block_structure") for scheme in _schemes(said))):
            if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
                return size[0], size[1]
    return BLOCK


def weight_bits(config: Mapping[str, Any]) -> set[int]:
    """`num_bits` of the weights in all groups of compressed-tensors."""
    found = [scheme.get("num_bits") for said in _said(config) for scheme in _schemes(said)]
    return {bits for bits in found if isinstance(bits, int)}


def _said(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What config.json says about quantisation, wherever it does."""
    owners = _mappings([config, config.get("text_config")])
    return _mappings([owner.get(key) for owner in owners for key in QUANTISED])


def _schemes(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How each group of compressed-tensors stores its weights."""
    return _mappings([group.get("weights") for group in _mappings(said.get("config_groups"))])


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    """Those of a dictionary's values, or of a list's, that are dictionaries."""
    found = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
    return [value for value in found if isinstance(value, Mapping)]


@dataclass(frozen=True, slots=True)
class Scaled:
    """How a weight of FP8 is scaled."""

    scale: TensorInfo
    blocks: Blocks


def scaled_weights(checkpoint: Checkpoint) -> dict[str, Scaled]:
    """The matrices of FP8 that can be computed with, by name: those with one scale of a shape that says its blocks."""
    found = {}
    for name, info in checkpoint.tensors.items():
        scaled = _scaled(checkpoint, info) if info.dtype in WEIGHTS else ""
        if isinstance(scaled, Scaled):
            found[name] = scaled
    return found


def misfit(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """Why a weight of FP8 cannot be computed with; nothing where it can, and for another dtype."""
    found = _scaled(checkpoint, info) if info.dtype in WEIGHTS else ""
    return found if isinstance(found, str) else ""


def _scaled(checkpoint: Checkpoint, info: TensorInfo) -> Scaled | str:
    """How a weight of FP8 is scaled, or what is wrong with it."""
    if len(info.shape) != 2 or not math.prod(info.shape):
        return f"of shape {info.shape}, expected a matrix"
    beside = [checkpoint.tensors[info.name + end] for end in SUFFIXES if info.name + end in checkpoint.tensors]
    if len(beside) != 1:
        return "with two scales, expected one" if beside else "without a scale beside it"
    if beside[0].dtype not in SCALES:
        return f"with a scale of {beside[0].dtype}, expected {', '.join(SCALES)}"
    (m, n), config = info.shape, model_of(checkpoint, info.name).config
    blocks = blocks_of((m, n), beside[0].shape, config)
    if blocks is None:
        size = Blocks(*_block_size(config))
        return (
            f"of shape {(m, n)} with a scale of shape {beside[0].shape}, expected one number, {(m, 1)}, or "
            f"{size.grid(m, n)} for blocks of {size.rows} x {size.columns}"
        )
    return Scaled(beside[0], blocks)


def scale_names(scaled: Mapping[str, Scaled]) -> set[str]:
    """The names of the scales."""
    return {one.scale.name for one in scaled.values()}
