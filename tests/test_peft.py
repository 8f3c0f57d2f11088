"""LoRA adapters that PEFT makes and saves, run, and held against an oracle that takes each change from PEFT itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]  # warnings of other libraries are theirs
peft = pytest.importorskip("peft", reason="`make compat` has an environment with it")

from zoo import ZOO  # noqa: E402

from lox_stream import CheckpointError, Options, extrapolate  # noqa: E402
from lox_stream.recomputing import rounded_once  # noqa: E402

RANK, ALPHA, SHARE = 3, 1.25, 0.9995
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": LLAMA, "r": 8, "lora_alpha": 16}),
    "all linear layers": ("qwen3", {"target_modules": "all-linear", "r": 2}),
    "rslora": ("llama", {"target_modules": LLAMA, "r": 8, "lora_alpha": 3, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "r": 4,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "up_proj": 12, r"layers\.\d.mlp.gate_proj": 5},
            "alpha_pattern": {"layers.1.mlp.down_proj": 1, "self_attn.*": 7},
        },
    ),
    "rank over the short side": ("llama", {"target_modules": ["q_proj", "k_proj"], "r": 40}),
    "turned weights": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True}),
    "turned weights, unsaid": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4}),
    "tied embedding": ("llama, tied", {"target_modules": ["embed_tokens", "v_proj"], "r": 4}),
    "embedding of positions": ("opt", {"target_modules": ["embed_positions", "fc1"], "r": 4}),
    "convolutions in 1d": ("whisper", {"target_modules": ["conv1", "conv2", "out_proj"], "r": 4}),
    "convolutions in 2d": ("vit", {"target_modules": ["projection", "query", "value"], "r": 4}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "r": 4}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"], "r": 4}),
    "orthogonal": ("llama", {"target_modules": LLAMA, "r": 4, "init_lora_weights": "orthogonal"}),
    "stacks": ("llama4", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4}),
    "stacks, transposed": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4}),
    "stacks, renamed": ("granitemoe", {"target_modules": [], "target_parameters": EXPERTS, "r": 4}),
    "one stack": ("gpt_oss", {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 4}),
    "stacks with patterns": (
        "llama4",
        {
            "target_modules": ["o_proj"],
            "target_parameters": EXPERTS,
            "r": 4,
            "rank_pattern": {"experts.down_proj": 7, "o_proj": 2},
            "alpha_pattern": {"layers.1.feed_forward.experts.gate_up_proj": 3},
        },
    ),
    "stacks that files have apart": ("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS, "r": 4}),
    "stacks of Mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4}),
    "modules that PEFT stacks": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 4}),
    "a square stack": ("qwen2_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "r": 4}),
    "blocks": ("recurrent_gemma", {"target_modules": [], "target_parameters": ["rg_lru.input_gate_weight"], "r": 2}),
    "weights of linear layers": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]}),
}
APART = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
)  # whose files have the gate and the projection up of each expert by itself


def adapted(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> nn.Module:
    """A model of the zoo saved in a dtype with an adapter of random factors beside it; with PEFT around it."""
    torch.manual_seed(0)
    model = ZOO[name]().to(dtype)
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for where, parameter in wrapped.named_parameters():
            if "lora_" in where:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


def changes(wrapped: nn.Module) -> dict[str, Tensor]:
    """What PEFT adds to the weight of each module, in float64."""
    found = {}
    for where, module in wrapped.double().base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.scaling:
            name = f"{where}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", "")
            found[name] = module.get_delta_weight("default").detach()
    return found


def by_matrix(w0: Tensor, delta: Tensor, where: str, *, apart: bool) -> Tensor:
    """Each matrix of a stack by itself, and in `apart` files the two of a gate and a projection up."""
    if w0.dim() != 3 or "conv" in where:
        return extrapolated(w0, delta)
    halves = 2 if apart and where.endswith("gate_up_proj") else 1
    shape = (w0.shape[0] * halves, w0.shape[1] // halves, w0.shape[2])
    matrices = zip(w0.reshape(shape), delta.reshape(shape), strict=True)
    return torch.stack([extrapolated(*both) for both in matrices]).view(w0.shape)


def extrapolated(w0: Tensor, delta: Tensor) -> Tensor:
    """W0 + delta + alpha * rank-k part of delta, by LAPACK in float64; a convolution as (out, all the rest)."""
    u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    part = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    return w0.double() + delta + ALPHA * part.view(delta.shape)


def loaded(kind: type, folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The parameters of a model, of which no key may be missing or left over."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(told.values()), told
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_is_extrapolated_and_the_whole_model_loads(case, tmp_path):
    name, config = CASES[case]
    wrapped = adapted(name, tmp_path, **config)
    kind = type(wrapped.base_model.model)
    extrapolate(*(tmp_path / side for side in ("base", "adapter", "out")), options=Options(RANK, ALPHA))
    base, out = loaded(kind, tmp_path / "base"), loaded(kind, tmp_path / "out")
    delta = changes(wrapped)
    assert delta.keys() <= out.keys(), "the oracle found a module that is no parameter"
    assert delta, "the oracle found no factors"
    same = elements = 0
    for where, w in out.items():
        if where not in delta:
            assert torch.equal(w, base[where]), where
            continue
        exact = by_matrix(base[where], delta[where], where, apart=name in APART)
        right = rounded_once(exact.contiguous(), torch.bfloat16)
        same += int((right == w).sum())
        elements += w.numel()
        assert not torch.equal(w, base[where]), where
    assert same >= SHARE * elements


MERGED = [
    case for case, (_, config) in CASES.items() if config.get("target_parameters") or "w1" in config["target_modules"]
]


@pytest.mark.parametrize("case", [*MERGED, "experts in two dimensions"])
def test_what_it_merges_of_stacks_is_what_peft_merges(case, tmp_path):
    """In float32, to its rounding."""
    two = ("dbrx", {"target_modules": [], "target_parameters": ["mlp.w1", "mlp.w2", "mlp.v1"], "r": 4})
    name, config = CASES.get(case, two)
    wrapped = adapted(name, tmp_path, torch.float32, **config)
    kind, delta = type(wrapped.base_model.model), changes(copy.deepcopy(wrapped))
    extrapolate(*(tmp_path / side for side in ("base", "adapter", "out")), options=Options(alpha=0.0))
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for where, w in loaded(kind, tmp_path / "out", torch.float32).items():
        change = float(delta[where].norm()) if where in delta else 0.0
        assert change or torch.equal(w, merged[where]), where
        assert float((w - merged[where]).norm()) <= 1e-5 * change + 1e-6 * float(w.norm()), where


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "init_lora_weights"),
        ("llama", {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}, "bias"),
        ("llama, tied", {"target_modules": ["lm_head"]}, "base lacks"),
        ("convnext", {"target_modules": ["dwconv"], "r": 32}, "grouped"),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}, "base lacks"),
    ],
)
def test_what_does_more_than_add_its_factors_is_refused_by_name(name, config, says, tmp_path):
    adapted(name, tmp_path, **config)
    with pytest.raises(CheckpointError, match=says):
        extrapolate(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "VeraConfig", "AdaLoraConfig"])
def test_other_adapters_are_refused_as_what_they_are(kind, tmp_path):
    model = ZOO["llama"]().bfloat16()
    model.save_pretrained(tmp_path / "base")
    more = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    more |= {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **more)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"peft_type is '{config.peft_type.value}'"):
        extrapolate(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
