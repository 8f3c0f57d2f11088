#!/usr/bin/env python3
"""Checkpoints of the largest open models without their bytes: exact names, shapes, dtypes and shards, in sparse files.

    python benchmarks/giants.py llama-3.1-70b /tmp/70b       /tmp/70b/base and /tmp/70b/aligned, 141 GB each to the eye
    lox-stream run --base /tmp/70b/base --aligned /tmp/70b/aligned --out /tmp/70b/out --dry-run

    python benchmarks/giants.py llama-3.1-405b /tmp/405b --nodes 1,8,64 --assume disk=7GB/s,cores=64

With --nodes it also says what `run --ray` would take on so many machines, by the cost model of --dry-run --assume: each
file of the output is a part, a node carries out one at a time and has the assumed disk to itself, and a free node takes
the largest part that is left. A part takes what its disk or its cores take, whichever is longer; the start of the
processes and the publishing are not in it.

A header is real, what follows it is a hole: a file system that knows holes stores some kilobytes. Shards are cut as
`save_pretrained` cuts them: in the order of the tensors, a new one where 5 GB (Qwen: 4 GB) would be passed. DeepSeek-V3
is published in FP8; here it is in bf16, as its own script converts it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lox_stream.options import Options
from lox_stream.predicting import Machine, parse_machine, predict
from lox_stream.showing import time_text
from lox_stream.spreading import part_of, parts_of, plan_spread

Shapes = Iterator[tuple[str, tuple[int, ...]]]
SHARD_BYTES = 5_000_000_000
BIAS = "e_score_correction_bias"  # of DeepSeek-V3, the one tensor in float32


def attention(prefix: str, hidden: int, heads: int, kv_heads: int, head: int, *, bias: bool = False) -> Shapes:
    for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
        if bias:
            yield f"{prefix}.{name}_proj.bias", (rows,)
        yield f"{prefix}.{name}_proj.weight", (rows, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, heads * head)


def gated(prefix: str, hidden: int, inner: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def norms(prefix: str, hidden: int) -> Shapes:
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def dense(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, bias: bool = False
) -> Shapes:
    """Llama and Qwen2."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield from attention(f"{layer}.self_attn", hidden, heads, kv_heads, hidden // heads, bias=bias)
        yield from gated(f"{layer}.mlp", hidden, inner)
        yield from norms(layer, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def mixtral(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, experts: int) -> Shapes:
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield from attention(f"{layer}.self_attn", hidden, heads, kv_heads, hidden // heads)
        yield f"{layer}.block_sparse_moe.gate.weight", (experts, hidden)
        for j in range(experts):
            expert = f"{layer}.block_sparse_moe.experts.{j}"
            yield f"{expert}.w1.weight", (inner, hidden)
            yield f"{expert}.w2.weight", (hidden, inner)
            yield f"{expert}.w3.weight", (inner, hidden)
        yield from norms(layer, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def deepseek_v3(hidden: int = 7168, layers: int = 61, vocabulary: int = 129280) -> Shapes:
    """With the layer of its multi-token prediction, the last."""
    heads, nope, rope, value, q_rank, kv_rank, experts, inner = 128, 128, 64, 128, 1536, 512, 256, 2048
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers + 1):
        layer = f"model.layers.{i}"
        attended = f"{layer}.self_attn"
        yield f"{attended}.q_a_proj.weight", (q_rank, hidden)
        yield f"{attended}.q_a_layernorm.weight", (q_rank,)
        yield f"{attended}.q_b_proj.weight", (heads * (nope + rope), q_rank)
        yield f"{attended}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
        yield f"{attended}.kv_a_layernorm.weight", (kv_rank,)
        yield f"{attended}.kv_b_proj.weight", (heads * (nope + value), kv_rank)
        yield f"{attended}.o_proj.weight", (hidden, heads * value)
        if i < 3:
            yield from gated(f"{layer}.mlp", hidden, 18432)
        else:
            yield f"{layer}.mlp.gate.weight", (experts, hidden)
            yield f"{layer}.mlp.gate.e_score_correction_bias", (experts,)
            for j in range(experts):
                yield from gated(f"{layer}.mlp.experts.{j}", hidden, inner)
            yield from gated(f"{layer}.mlp.shared_experts", hidden, inner)
        yield from norms(layer, hidden)
        if i == layers:
            yield f"{layer}.embed_tokens.weight", (vocabulary, hidden)
            yield f"{layer}.enorm.weight", (hidden,)
            yield f"{layer}.hnorm.weight", (hidden,)
            yield f"{layer}.eh_proj.weight", (hidden, 2 * hidden)
            yield f"{layer}.shared_head.norm.weight", (hidden,)
            yield f"{layer}.shared_head.head.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


MODELS: dict[str, tuple[Callable[[], Shapes], int]] = {  # tensors, and the size of a shard as published
    "llama-3.1-70b": (lambda: dense(8192, 28672, 80, 64, 8, 128256), SHARD_BYTES),
    "llama-3.1-405b": (lambda: dense(16384, 53248, 126, 128, 8, 128256), SHARD_BYTES),
    "qwen2.5-72b": (lambda: dense(8192, 29568, 80, 64, 8, 152064, bias=True), 4_000_000_000),
    "mixtral-8x22b": (lambda: mixtral(6144, 16384, 56, 48, 8, 32768, 8), SHARD_BYTES),
    "deepseek-v3": (deepseek_v3, SHARD_BYTES),
}


def size_of(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (4 if name.endswith(BIAS) else 2)


def shards_of(shapes: Shapes, most: int = SHARD_BYTES) -> list[dict[str, tuple[int, ...]]]:
    """As `huggingface_hub.split_torch_state_dict_into_shards` cuts: one larger than a shard has its own."""
    shards: list[dict[str, tuple[int, ...]]] = []
    current: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes:
        size = size_of(name, shape)
        if size > most:
            shards.append({name: shape})
            continue
        if current and held + size > most:
            shards.append(current)
            current, held = {}, 0
        current[name] = shape
        held += size
    return [*shards, current] if current else shards


def write(folder: Path, shards: list[dict[str, tuple[int, ...]]]) -> None:
    """The shards as sparse files, and their index."""
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard.items():
            end = offset + size_of(name, shape)
            dtype = "F32" if name.endswith(BIAS) else "BF16"
            header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False, "torch_dtype": "bfloat16"}))


def spread(folder: Path, nodes: list[int], machine: Machine) -> Iterator[tuple[int, float, int]]:
    """For each number of nodes the predicted seconds of a run, and the parts of the node that has most."""
    (whole,) = plan_spread(folder / "base", folder / "aligned", [(folder / "out", Options())], dry=True)
    times = [predict(part_of(whole, part), machine).elapsed_s or 0.0 for part in parts_of([whole])]
    for count in nodes:
        free = [(0.0, 0)] * count
        for took in sorted(times, reverse=True):
            at, parts = heapq.heappop(free)
            heapq.heappush(free, (at + took, parts + 1))
        yield count, max(free)[0], max(parts for _, parts in free)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="gets base and aligned")
    parser.add_argument("--nodes", default="", help="also predict a run on so many nodes, such as 1,8,64")
    parser.add_argument("--assume", default="disk=7GB/s,cores=64", help="of a node (default: %(default)s)")
    args = parser.parse_args(argv)
    shapes, most = MODELS[args.model]
    shards = shards_of(shapes(), most)
    for side in ("base", "aligned"):
        write(args.folder / side, shards)
    count = sum(map(len, shards))
    total = sum(size_of(name, shape) for shard in shards for name, shape in shard.items())
    print(f"{args.model}: {count} tensors, {total:,} bytes in {len(shards)} shards, twice in {args.folder}")
    nodes = [int(word) for word in args.nodes.split(",") if word]
    for number, seconds, parts in spread(args.folder, nodes, parse_machine(args.assume)) if nodes else ():
        print(f"{number} nodes, each with {args.assume}: {time_text(seconds)}, {parts} parts at most on one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
