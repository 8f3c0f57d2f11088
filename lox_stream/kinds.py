"""What a tensor is to its model: a matrix that it multiplies with, a stack of them, or numbers that it adds or scales.

The shape tells almost everything; the tables here hold the names where it does not, of all architectures in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from lox_stream.names import matches

Kind = Literal["matrix", "vector", "bias", "elementwise", "depthwise"]

BIASES = ("*bias",)  # also those of stacked experts, in two dimensions, and masks that old GPT-2 files call `attn.bias`
ELEMENTWISE = (
    *("*A_log", "*.time_decay", "*.time_first", "*.time_faaaa"),  # state-space models and RWKV: rates, one a channel
    *("*flows.*.translate", "*flows.*.log_scale"),  # flows of VITS, (channels, 1)
    *("*scale_shift_table", "*.layer_scale*"),  # diffusion transformers, ConvNeXt: added or multiplied, one a channel
    *("*_token", "*cls_tokens", "*class_tokens", "*mask_tokens", "*register_tokens", "*query_tokens"),  # rows that
    *("*detection_tokens", "*memory_tokens", "*padding_tokens"),  # stand among others: class, mask, registers
    *("*.weight_g", "*.weight_v", "*.parametrizations.*.original?"),  # of a weight norm: the weight is their quotient
)
CONVOLUTIONS = ("*conv*",)  # of three dimensions, (out, in, width)
BY_HEAD = ("*.rel_attn.[qkvor]", "*.rel_attn.seg_embed")  # of three dimensions, (in, heads, head): XLNet
GRIDS = ("*pos_embed*", "*position_embed*", "*positional_embed*")  # of four, (1, h, w, dim) or (1, dim, h, w)
EXPERTS = ("*expert*",)  # never a convolution
WIDTH = 32  # last dimensions below this are a convolution's, whatever its name
STACKED = (  # experts in two dimensions, one under the other; where a config tells how many
    (
        ("*.ffn.experts.mlp.w1", "*.ffn.experts.mlp.v1", "*.ffn.experts.mlp.w2"),
        ("ffn_config", "moe_num_experts"),
    ),  # DBRX
)


def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
    """Whether a tensor of floats is one or several matrices; else what it is.

    A lookup is a product with a row that holds a single one, so embeddings of words and positions are matrices.

    >>> kind_of("model.embed_tokens.weight", (32000, 4096)), kind_of("layers.0.mixer.conv1d.weight", (64, 1, 4))
    ('matrix', 'depthwise')
    """
    sides = [length for length in shape if length > 1]
    if len(shape) < 2 or (len(shape) > 2 and len(sides) < 2):
        return "vector"
    if matches(name, BIASES):
        return "bias"
    if matches(name, ELEMENTWISE):
        return "elementwise"
    if _is_grid(name, shape) or matches(name, BY_HEAD):
        return "matrix"
    return "depthwise" if _convolves(name, shape) and shape[1] == 1 else "matrix"


def stack_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(count, m, n) of a tensor whose kind is "matrix": so many matrices, one after the other.

    A convolution is one matrix, (out, all the rest), and so is all of four dimensions and more but a grid of positions,
    which has a row for each of them; else the first of three dimensions counts matrices (experts).

    >>> stack_of("model.layers.0.mlp.experts.down_proj", (8, 512, 128), {}), stack_of("conv1.weight", (384, 80, 3), {})
    ((8, 512, 128), (1, 384, 240))
    """
    for names, keys in STACKED:
        count = _number(config, keys) if matches(name, names) else 0
        if len(shape) == 2 and count and shape[0] % count == 0:
            return count, shape[0] // count, shape[1]
    if _is_grid(name, shape):
        first = shape[2] == shape[3] and shape[1] != shape[2]  # (1, dim, h, w), the other way (1, h, w, dim)
        return (1, shape[1], shape[2] * shape[3]) if first else (1, shape[1] * shape[2], shape[3])
    if len(shape) == 3 and not _convolves(name, shape):
        return shape[0], shape[1], shape[2]
    return 1, shape[0], prod(shape[1:])


def _is_grid(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] == 1 and matches(name, GRIDS)


def _convolves(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is one matrix, (out, all the rest). What has one output is told by its name alone: so may latents."""
    if len(shape) != 3 or matches(name, EXPERTS):
        return len(shape) > 3
    named = matches(name, CONVOLUTIONS) and not (shape[0] == 1 and matches(name, GRIDS))
    return named or matches(name, BY_HEAD) or (shape[0] > 1 and shape[2] < WIDTH)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """A whole number deep in a config; 0 where there is none."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0
