"""Checkpoint pairs with known spectra, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

RELATIVE_DELTA = 3e-3  # |delta| / |W1|, as supervised fine-tuning leaves it


def power_law(count: int, exponent: float = 0.55, rank: int = 6, ratio: float | None = 0.95) -> Tensor:
    """(count,) float32 singular values i^-exponent, those after `rank` scaled so that s_(rank+1) / s_rank = ratio."""
    s = torch.arange(1, count + 1, dtype=torch.float32) ** -exponent
    if ratio is not None and count > rank:
        s[rank:] *= ratio * s[rank - 1] / s[rank]
    return s


def orthonormal(length: int, count: int, generator: torch.Generator) -> Tensor:
    """(length, count) float32 orthonormal columns with no small or large entries, count <= length.

    Here as in all of this module, tensors lie where their generator does.

    Columns of the DCT-II matrix, rows shuffled and both sides given random signs: a Haar matrix needs a QR, which
    costs seconds at 4096.
    """
    rows = (_shuffled(length, generator).double() + 0.5) * (math.pi / length)
    frequencies = _shuffled(length, generator)[:count].double()
    matrix = torch.cos(rows[:, None] * frequencies) * math.sqrt(2 / length)
    matrix[:, frequencies == 0] = 1 / math.sqrt(length)
    return (_signs(length, generator)[:, None] * matrix * _signs(count, generator)).float()


def matrix(m: int, n: int, spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """(m, n) float32 matrix with the given singular values (at most min(m, n) of them)."""
    u, v = orthonormal(m, len(spectrum), generator), orthonormal(n, len(spectrum), generator)
    return (u * spectrum.to(u.device)) @ v.T


def weight(m: int, n: int, generator: torch.Generator) -> Tensor:
    """(m, n) float32 normal weights of deviation 0.02."""
    return torch.randn(m, n, generator=generator, device=generator.device).mul_(0.02)


def pair_of(
    m: int, n: int, generator: torch.Generator, *, dtype: torch.dtype = torch.bfloat16, spectrum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W0, W1) of a layer: normal weights of deviation 0.02 and a delta of RELATIVE_DELTA with `spectrum`."""
    w0 = weight(m, n, generator)
    delta = matrix(m, n, power_law(min(m, n)) if spectrum is None else spectrum, generator)
    delta *= RELATIVE_DELTA * w0.norm() / delta.norm()
    return w0.to(dtype), (w0 + delta).to(dtype)


def llama_shapes(
    hidden: int, intermediate: int, layers: int, vocabulary: int, kv: int | None = None, *, tied: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint."""
    kv = kv or hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def llama_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json for `llama_shapes`, so that transformers loads the model; without sizes for other shapes."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    embedding, layer = "model.embed_tokens.weight", "model.layers.0"
    up, k = f"{layer}.mlp.up_proj.weight", f"{layer}.self_attn.k_proj.weight"
    if not {embedding, up, k} <= shapes.keys():
        return config
    (vocabulary, hidden), kv = shapes[embedding], shapes[k][0]
    head = math.gcd(hidden, kv, 64)
    return config | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes[up][0],
        "num_hidden_layers": sum(name.endswith(".k_proj.weight") for name in shapes),
        "num_attention_heads": hidden // head,
        "num_key_value_heads": kv // head,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }


def write_pair(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    base_shards: int = 1,
    aligned_shards: int = 1,
) -> tuple[Path, Path]:
    """Write folder/base and folder/aligned with a config each; one shard's tensors are in memory at a time."""
    config = llama_config(shapes)
    roots = folder / "base", folder / "aligned"
    for root, shards, side in zip(roots, (base_shards, aligned_shards), (0, 1), strict=True):
        root.mkdir(parents=True)
        (root / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_shards(root, list(_shards_of(shapes, shards)), seed, dtype, side)
    return roots


def _write_shards(
    root: Path, shards: Sequence[Mapping[str, tuple[int, ...]]], seed: int, dtype: torch.dtype, side: int
) -> None:
    """Each tensor is made from (seed, its name), so that both sides can be written one after the other."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        many = len(shards) > 1
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        tensors = {}
        for tensor, shape in shapes.items():
            generator = torch.Generator().manual_seed(hash_of(seed, tensor))
            tensors[tensor] = _tensor(shape, generator, dtype, side)
        save_file(tensors, root / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def hash_of(seed: int, name: str) -> int:
    """A 63-bit seed of its own for each name."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()) >> 1


def _tensor(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, side: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    if side == 0:  # delta costs a hundred times as much
        return weight(shape[0], shape[1], generator).to(dtype)
    return pair_of(shape[0], shape[1], generator, dtype=dtype)[1]


def _shards_of(shapes: Mapping[str, tuple[int, ...]], count: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Cut the list of tensors into `count` runs of about the same size."""
    total = sum(math.prod(shape) for shape in shapes.values())
    shard: dict[str, tuple[int, ...]] = {}
    seen = made = 0
    for name, shape in shapes.items():
        shard[name] = shape
        seen += math.prod(shape)
        if seen * count >= total * (made + 1) and made + 1 < count:
            yield shard
            shard, made = {}, made + 1
    if shard:
        yield shard


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator, device=generator.device).double().mul_(2).sub_(1)


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)
