"""The files that are written where they are not aligned's own: tensors of other dtypes, shards of another size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import PurePosixPath
from typing import Any

import xxhash

from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, Shard, TensorInfo, models_in
from lox_stream.kinds import kind_of
from lox_stream.layout import INDEX_SUFFIX, stem_of
from lox_stream.names import matches
from lox_stream.quantisation import FLOATS
from lox_stream.scales import ACTIVATIONS, scale_names, scaled_weights
from lox_stream.shards import header_of

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # that the output may be asked to have
ENDING = ".safetensors"


def output_dtypes(aligned: Checkpoint, dtype: str) -> dict[str, str]:
    """The dtype of each tensor of the output, where `dtype` is asked for, or "same".

    Of floats, but not of vectors that are wider than every matrix: these are so on purpose (biases of a router). Scales
    of FP8, those of activations too, are not written where the weights are no longer FP8.
    """
    found = {name: info.dtype for name, info in aligned.tensors.items()}
    if dtype == "same":
        return found
    scaled = scaled_weights(aligned)
    scales = scale_names(scaled) | {name for name in found if scaled and matches(name, ACTIVATIONS)}
    found = {name: dtype for name, dtype in found.items() if name not in scales}
    floats = {name: info for name, info in aligned.tensors.items() if name in found and info.dtype in FLOATS}
    matrices = {name for name, info in floats.items() if kind_of(name, info.shape) == "matrix"}
    widest = max((DTYPE_BYTES[found[name]] for name in matrices), default=DTYPE_BYTES["F64"])
    asked = {name for name, info in floats.items() if name in matrices or DTYPE_BYTES[info.dtype] <= widest}
    return found | dict.fromkeys([*asked, *scaled], DTYPES[dtype])


def rewritten(aligned: Checkpoint, dtypes: Mapping[str, str], max_shard_bytes: int) -> Checkpoint:
    """The checkpoint as the output has it: `aligned` itself where nothing changes.

    `dtypes` names every tensor that is written, with its dtype. `max_shard_bytes` of tensors are in a shard, or one
    larger tensor; 0 keeps the shards. Of each tensor `place` and `n_bytes` are those in the output.
    """
    same = all(dtypes.get(name) == info.dtype for name, info in aligned.tensors.items())
    if same and not max_shard_bytes:
        return aligned
    models = tuple(_rewritten(model, dtypes, max_shard_bytes) for model in models_in(aligned))
    if not aligned.components:
        return models[0]
    shards = tuple(shard for model in models for shard in model.shards)
    return replace(aligned, shards=shards, tensors=_by_name(shards), components=models)


def _rewritten(model: Checkpoint, dtypes: Mapping[str, str], max_shard_bytes: int) -> Checkpoint:
    shards = tuple(
        replace(shard, tensors=tuple(_as(info, dtypes[info.name]) for info in shard.tensors if info.name in dtypes))
        for shard in model.shards
    )
    stem = stem_of(model.index_name or shards[0].name)
    names = [shard.name for shard in shards]
    if _is_variant(model, stem):  # of half precision, as a rule, which may be no longer so
        names = _names(stem, len(shards))
    if max_shard_bytes:
        infos = [info for shard in shards for info in shard.tensors]
        groups = balanced([info.n_bytes for info in infos], max_shard_bytes)
        names = _names(stem, len(groups))
        first = shards[0]
        shards = tuple(replace(first, tensors=tuple(infos[group])) for group in groups)
    laid = tuple(laid_out(shard, name, model.prefix) for shard, name in zip(shards, names, strict=True))
    index_name = f"{stem}{INDEX_SUFFIX}" if len(laid) > 1 else None
    index = (
        None
        if index_name is None
        else (model.index or {"metadata": {}}) | {"weight_map": _weight_map(laid, model.prefix)}
    )
    return replace(model, shards=laid, tensors=_by_name(laid), index_name=index_name, index=index)


def _as(info: TensorInfo, dtype: str) -> TensorInfo:
    return info if dtype == info.dtype else replace(info, dtype=dtype, n_bytes=prod(info.shape) * DTYPE_BYTES[dtype])


def balanced(sizes: Sequence[int], limit: int) -> list[slice]:
    """The fewest runs of consecutive sizes that sum to `limit` at most, or are one, and as equal as may be.

    >>> balanced([3, 3, 3, 1], 9), balanced([20, 1], 9)
    ([slice(0, 2, None), slice(2, 4, None)], [slice(0, 1, None), slice(1, 2, None)])
    """
    count = len(_filled(sizes, limit))
    low, high = 0, limit
    while low + 1 < high:  # high is enough for so many runs, low is not
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, middle)) <= count else (middle, high)
    return _filled(sizes, high)


def _filled(sizes: Sequence[int], limit: int) -> list[slice]:
    """One run after the other, each as long as it may be; one at least."""
    cuts, held = [0], 0
    for i, size in enumerate(sizes):
        if held and held + size > limit:
            cuts.append(i)
            held = 0
        held += size
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _is_variant(model: Checkpoint, stem: str) -> bool:
    """Whether the files are named as a variant of a model, such as fp16, and not as the model itself."""
    if model.index_name is not None:
        return model.index_name != stem + INDEX_SUFFIX
    return model.shards[0].name != stem + ENDING


def _names(stem: str, count: int) -> list[str]:
    """As transformers and diffusers number them."""
    if count == 1:
        return [stem + ENDING]
    return [f"{stem}-{i:05d}-of-{count:05d}{ENDING}" for i in range(1, count + 1)]


def laid_out(shard: Shard, name: str, prefix: str) -> Shard:
    """The shard as a file of its own: a new header, the widest dtypes first, as safetensors itself sorts them."""
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    infos = sorted(shard.tensors, key=lambda info: -DTYPE_BYTES.get(info.dtype, 0))
    for info in infos:
        offsets = [at, at + info.n_bytes]
        entries[info.name.removeprefix(prefix)] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": offsets,
        }
        at += info.n_bytes
    header = header_of(entries, json.loads(shard.header[8:]).get("__metadata__"))
    placed = tuple(
        replace(info, place=len(header) + entry["data_offsets"][0])
        for info, entry in zip(infos, entries.values(), strict=True)
    )
    digest = xxhash.xxh3_128_hexdigest(header)
    return replace(shard, name=name, header=header, header_hash=digest, tensors=placed, written_bytes=len(header) + at)


def _weight_map(shards: Sequence[Shard], prefix: str) -> dict[str, str]:
    names = {
        info.name.removeprefix(prefix): PurePosixPath(shard.name).name for shard in shards for info in shard.tensors
    }
    return dict(sorted(names.items()))


def _by_name(shards: Sequence[Shard]) -> dict[str, TensorInfo]:
    return {info.name: info for shard in shards for info in shard.tensors}
