"""Fused projections: several matrices that a model keeps in one tensor, and where each of them lies in it.

The table says it by names and by the `model_type` of the config, and holds what was read in the models' own code
(transformers 5.24, diffusers 0.42). Where the config does not tell, or its numbers are not those of the shape, the
parts are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lox_stream.names import counted, listing, matches

HEADS = ("num_attention_heads", "n_head", "n_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query_group_num")


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix (m, n) within a larger one, whose elements are cut into `groups` of one length: of each so many from
    `first` on. One group: consecutive rows."""

    label: str
    m: int
    n: int
    groups: int
    first: int


Parts = tuple[Part, ...]
Layout = Callable[[int, int, Mapping[str, Any]], Parts]  # of the whole's rows and columns, and the numbers of a config


def rows(m: int, n: int, sizes: Mapping[str, int], times: int = 1) -> Parts:
    """Parts of so many rows, one under the other, all of that `times` over; none where that is not the whole.

    >>> [(part.label, part.m, part.first) for part in rows(8, 4, {"q": 4, "k": 2, "v": 2})]
    [('q', 4, 0), ('k', 2, 16), ('v', 2, 24)]
    """
    if min(sizes.values()) < 1 or sum(sizes.values()) * times != m:
        return ()
    begins = accumulate(sizes.values(), initial=0)
    return tuple(
        Part(label, size * times, n, times, begin * n)
        for (label, size), begin in zip(sizes.items(), begins, strict=False)
    )


def columns(m: int, n: int, sizes: Mapping[str, int], times: int = 1) -> Parts:
    """Parts of so many columns, side by side, all of that `times` over; none where that is not the whole."""
    if min(sizes.values()) < 1 or sum(sizes.values()) * times != n:
        return ()
    begins = accumulate(sizes.values(), initial=0)
    return tuple(
        Part(label, m, size * times, m * times, begin)
        for (label, size), begin in zip(sizes.items(), begins, strict=False)
    )


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of some whole numbers that a config has; 0 where it has none."""
    for key in keys:
        found = config.get(key)
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return 0


def _alike(labels: str) -> Layout:
    """As many rows each."""
    names = labels.split()
    return lambda m, n, config: rows(m, n, dict.fromkeys(names, m // len(names)))


def _columns_alike(labels: str) -> Layout:
    names = labels.split()
    return lambda m, n, config: columns(m, n, dict.fromkeys(names, n // len(names)))


def _square(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """Queries, keys and values of as many rows as the whole has columns."""
    return rows(m, n, {"q": n, "k": n, "v": n})


def _interleaved(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """Every other column."""
    return columns(m, n, {"gate": 1, "up": 1}, n // 2)


def _one_after_another(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """All queries, then all keys, then all values."""
    heads, key_heads = _number(config, *HEADS), _number(config, *KEY_HEADS) or _number(config, *HEADS)
    size = m // max(1, heads + 2 * key_heads)
    if size != (_number(config, "head_dim") or size):
        return ()
    return rows(m, n, {"q": heads * size, "k": key_heads * size, "v": key_heads * size})


def _by_head(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """Query, key and value of a head, then of the next."""
    heads = _number(config, *HEADS)
    return rows(m, n, dict.fromkeys("qkv", m // (3 * heads)), heads) if heads else ()


def _by_key_head(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """For each head of keys the queries that share it, its key, its value."""
    heads, key_heads = _number(config, *HEADS), _number(config, *KEY_HEADS) or _number(config, *HEADS)
    if not heads or heads % key_heads:
        return ()
    size = m // (heads + 2 * key_heads)
    return rows(m, n, {"q": heads // key_heads * size, "k": size, "v": size}, key_heads)


def _falcon(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    if config.get("new_decoder_architecture") is True:
        return _by_key_head(m, n, config)
    return _one_key_head("multi_query")(m, n, config)


def _one_key_head(switch: str) -> Layout:
    """One head of keys and values behind all queries where the config says so, else by head."""

    def layout(m: int, n: int, config: Mapping[str, Any]) -> Parts:
        if config.get(switch) is True:
            return _one_after_another(m, n, {**config, KEY_HEADS[0]: 1})
        return _by_head(m, n, config) if config.get(switch) is False else ()

    return layout


def _chatglm(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    by = _one_after_another if config.get("multi_query_attention") is True else _by_head
    return by(m, n, config)


def _chatglm_ffn(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """From its second version on, whose configs name the size; the first has no gate."""
    return _alike("gate up")(m, n, config) if m == 2 * _number(config, "ffn_hidden_size") else ()


def _shards(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """CodeGen: four shards of queries, values, keys."""
    return rows(m, n, dict.fromkeys("qvk", m // 12), 4)


def _experts(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """One expert's gate over its projection up, (2 * ffn, hidden)."""
    return _alike("gate up")(m, n, config) if _number(config, "hidden_size") == n else ()


def _transposed_experts(by: Layout) -> Layout:
    """One expert, (hidden, 2 * ffn)."""
    return lambda m, n, config: by(m, n, config) if _number(config, "hidden_size") == m else ()


def _either_way(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """One expert as the hub has it, (hidden, 2 * ffn), or as transformers 5 saves it."""
    if m == n:
        return ()
    return _experts(m, n, config) or _transposed_experts(_columns_alike("gate up"))(m, n, config)


def _linear_heads(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Of a gated delta net: heads and their width, of keys and of values."""
    of = [_number(config, f"linear_num_{side}_heads") for side in ("key", "value")]
    width = [_number(config, f"linear_{side}_head_dim") for side in ("key", "value")]
    return of[0] or 1, width[0], of[1], width[1]


def _qkvz(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    heads, width, value_heads, value_width = _linear_heads(config)
    values = value_heads // heads * value_width
    return rows(m, n, {"q": width, "k": width, "v": values, "z": values}, heads)


def _ba(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    heads, _, value_heads, _ = _linear_heads(config)
    return rows(m, n, dict.fromkeys("ba", value_heads // heads), heads)


def _linear_qkv(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    heads, width, value_heads, value_width = _linear_heads(config)
    return rows(m, n, {"q": heads * width, "k": heads * width, "v": value_heads * value_width})


def _mamba2(m: int, n: int, config: Mapping[str, Any]) -> Parts:
    inner, heads = _number(config, "expand") * n, _number(config, "num_heads")
    state = _number(config, "n_groups") * _number(config, "state_size")
    return rows(m, n, {"z": inner, "x": inner, "B": state, "C": state, "dt": heads})


ANY = ()  # models whose config need not be known
GPT2 = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt")
TABLE: tuple[tuple[tuple[str, ...], tuple[str, ...], Layout], ...] = (  # names, `model_type`s, layout; the first counts
    (("*.qkv_proj.weight",), ("phi3", "phi3_v", "phi4mm", "phi4_multimodal"), _one_after_another),
    (("*.qkv_proj.weight",), ("minimax",), _by_head),
    (("*.qkv_proj.weight",), ("codegen",), _shards),
    (("*.qkv_proj.weight",), ("gte", "new"), _alike("q k v")),
    (("*.query_key_value.weight",), ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"), _by_head),
    (("*.query_key_value.weight",), ("falcon",), _falcon),
    (("*.query_key_value.weight",), ("chatglm",), _chatglm),
    (("*.dense_h_to_4h.weight",), ("chatglm",), _chatglm_ffn),
    (("*.crossattention.c_attn.weight",), GPT2, _columns_alike("k v")),
    (("*.attn.c_attn.weight",), GPT2, _columns_alike("q k v")),
    (("*.attn.c_attn.weight",), ("gpt_bigcode",), _one_key_head("multi_query")),
    (("*.Wqkv.weight",), ("dbrx",), _one_after_another),
    (("*.Wqkv.weight", "*.W_pack.weight"), ANY, _square),
    (("*.wqkv.weight",), ("internlm2",), _by_key_head),
    (("*.in_proj.weight",), ("deberta",), _by_head),
    (("*.in_proj.weight",), ("mamba", "falcon_mamba", "jamba"), _alike("x z")),
    (("*.in_proj.weight",), ("mamba2",), _mamba2),
    (("*.conv.in_proj.weight",), ("lfm2", "lfm2_moe"), _alike("B C x")),
    (("*.in_proj_qkvz.weight",), ("qwen3_next",), _qkvz),
    (("*.in_proj_ba.weight",), ("qwen3_next",), _ba),
    (("*.in_proj_qkv.weight",), ("qwen3_5_text", "qwen3_5_moe_text"), _linear_qkv),
    (("*in_proj_weight",), ANY, _alike("q k v")),  # torch.nn.MultiheadAttention
    (("*attn.qkv.weight", "*.attention.qkv.weight", "*.to_qkv.weight", "*.to_added_qkv.weight"), ANY, _square),
    (("*.experts.gate_up_proj",), ("gpt_oss",), _transposed_experts(_interleaved)),
    (
        ("*.experts.gate_up_proj", "*.experts.fc1.weight"),
        ("llama4_text", "aria_text", "openai_privacy_filter"),
        _transposed_experts(_columns_alike("gate up")),
    ),
    (("*.experts.gate_up_proj",), ("qwen3_vl_moe_text",), _either_way),
    (("*.experts.gate_up_proj", "*.block_sparse_moe.input_linear.weight"), ANY, _experts),
    (("*.gate_up_proj.weight", "*.shared_mlp.input_linear.weight"), ANY, _alike("gate up")),
    (("*.up_gate_proj.weight",), ANY, _alike("up gate")),
    (("*.mlp.Wi.weight",), ("modernbert",), _alike("input gate")),
    (("*.mlp.weights_in.weight", "*.mlp.w12.weight"), ANY, _alike("gate up")),  # DINOv2 with SwiGLU
)
GEGLU = ("*.ff.net.0.proj.weight",)  # of diffusers, where the ffn is 4 * hidden; without a gate it has the same name
FUSED = tuple(name for names, models, _ in TABLE for name in names if name != "*.dense_h_to_4h.weight")


def parts_of(name: str, m: int, n: int, config: Mapping[str, Any]) -> Parts:
    """The parts of a matrix (m, n), which is all of a tensor or one of its stack; none for one that is not known.

    >>> [(p.label, p.m, p.n) for p in parts_of("h.0.attn.c_attn.weight", 768, 2304, {"model_type": "gpt2"})]
    [('q', 768, 768), ('k', 768, 768), ('v', 768, 768)]
    """
    if matches(name, GEGLU):
        return _alike("up gate")(m, n, config) if m == 8 * n else ()
    for names, models, layout in TABLE:
        if not matches(name, names):
            continue
        for numbers in _configs(config):
            if models == ANY or numbers.get("model_type") in models:
                found = layout(m, n, numbers)
                if found or models != ANY:
                    return found
    return ()


def fused_warnings(whole: Iterable[str], scaled: Container[str]) -> list[str]:
    """That some tensors have names of fused projections, out of those that were to be split and are not.

    Of FP8 (`scaled`) none is, for a block of one scale may lie across two parts.
    """
    fused = [name for name in whole if matches(name, FUSED)]
    unknown = [name for name in fused if name not in scaled]
    fp8 = [name for name in fused if name in scaled]
    reasons = (
        (unknown, "and their shapes and config.json do not tell where the parts lie"),
        (fp8, "and are of FP8, which is not split"),
    )
    return [
        f"--split-fused: {counted(len(names), 'tensor')} with names of fused projections, {reason}: {listing(names)}. "
        "Each is extrapolated as one matrix"
        for names, reason in reasons
        if names
    ]


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config, and those of the models within, each with what it says of its attention."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    attention = config.get("attn_config")
    yield {**(attention if isinstance(attention, Mapping) else {}), **config}
    for one in inner:
        if "model_type" in one:
            yield from _configs(one)
