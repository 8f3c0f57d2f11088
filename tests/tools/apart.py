"""The parts of fused weights by the modules that use them: what their `forward` cuts out of the product."""

from __future__ import annotations

from torch import Tensor, nn

THIRDS = ("MptAttention", "ModernBertAttention", "BlipAttention", "Lfm2ShortConv", "VisionAttention")
BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention")


def parts(parent: nn.Module, module: nn.Module, child: str, own: str, weight: Tensor) -> list[Tensor] | None:
    """Views of a parameter `own` of `module`, which is `child` of `parent`, in its loaded form; None: it is one."""
    kind = type(module).__name__
    if own == "in_proj_weight":
        return list(weight.chunk(3, 0))
    if own == "gate_up_proj":
        if kind == "GptOssExperts":
            return [weight[..., ::2], weight[..., 1::2]]
        return list(weight.chunk(2, -1 if kind in ("Llama4TextExperts", "AriaExperts") else -2))
    if own != "weight" or weight.ndim != 2:
        return None
    return _of_layer(parent, child, weight)


def _of_layer(parent: nn.Module, child: str, weight: Tensor) -> list[Tensor] | None:
    kind = type(parent).__name__
    if child in ("gate_up_proj", "weights_in", "Wi") or (child == "input_linear" and "Shared" in kind):
        return list(weight.chunk(2, 0))
    if child in ("qkv", "Wqkv") and kind.endswith(THIRDS):
        return list(weight.chunk(3, 0))
    if child == "in_proj" and kind == "Lfm2ShortConv":
        return list(weight.chunk(3, 0))
    if kind in ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer") and child == "in_proj":
        return list(weight.chunk(2, 0))
    if child == "query_key_value" and kind in BY_HEAD:
        return list(weight.view(-1, 3, weight.shape[1] // _heads(parent), weight.shape[1]).unbind(1))
    if child == "query_key_value" and kind == "FalconAttention":
        return _falcon(parent, weight)
    if child == "qkv_proj" and kind == "Phi3Attention":
        q, kv = parent.o_proj.in_features, parent.num_key_value_heads * parent.head_dim
        return list(weight.split([q, kv, kv], 0))
    if child == "qkv_proj" and kind == "CodeGenAttention":
        return list(weight.view(parent.mp_num, 3, -1, weight.shape[1]).unbind(1))
    if child == "qkv_proj" and kind == "MiniMaxLightningAttention":
        return list(weight.view(parent.num_attention_heads, 3, parent.head_dim, -1).unbind(1))
    if child == "Wqkv" and kind == "DbrxAttention":
        kv = parent.num_key_value_heads * parent.head_dim
        return list(weight.split([parent.hidden_size, kv, kv], 0))
    if child == "c_attn" and kind == "GPTBigCodeAttention":
        if parent.multi_query:
            return list(weight.split([parent.embed_dim, parent.kv_dim, parent.kv_dim], 0))
        return list(weight.view(parent.num_heads, 3, parent.head_dim, -1).unbind(1))
    if child == "c_attn":  # a Conv1D, (in, out)
        return list(weight.split(parent.split_size, 1))
    if child == "in_proj" and kind == "DisentangledSelfAttention":
        return list(weight.view(parent.num_attention_heads, 3, -1, weight.shape[1]).unbind(1))
    if child == "in_proj" and kind == "Mamba2Mixer":
        state = parent.n_groups * parent.ssm_state_size
        return list(weight.split([*[parent.intermediate_size] * 2, state, state, parent.num_heads], 0))
    if child == "in_proj_qkvz":
        of_head = weight.view(parent.num_k_heads, -1, weight.shape[1])
        values = parent.value_dim // parent.num_k_heads
        return list(of_head.split([parent.head_k_dim, parent.head_k_dim, values, values], 1))
    if child == "in_proj_ba":
        return list(weight.view(parent.num_k_heads, 2, -1, weight.shape[1]).unbind(1))
    if child == "in_proj_qkv":
        return list(weight.split([parent.key_dim, parent.key_dim, parent.value_dim], 0))
    if child == "proj" and kind == "GEGLU":
        return list(weight.chunk(2, 0))
    return None


def _heads(parent: nn.Module) -> int:
    names = ("num_heads", "num_attention_heads")
    own = [getattr(parent, name) for name in names if hasattr(parent, name)]
    return own[0] if own else parent.config.num_attention_heads


def _falcon(parent: nn.Module, weight: Tensor) -> list[Tensor]:
    if parent.new_decoder_architecture:
        groups = weight.view(parent.num_kv_heads, -1, parent.head_dim, weight.shape[1])
        return [groups[:, :-2], groups[:, -2], groups[:, -1]]
    if parent.multi_query:
        heads = weight.view(-1, parent.head_dim, weight.shape[1])
        return [heads[:-2], heads[-2], heads[-1]]
    return list(weight.view(parent.num_heads, 3, parent.head_dim, -1).unbind(1))
