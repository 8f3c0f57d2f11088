"""One tensor out of two in memory is the tensor that `run` writes, whatever it is and however it lies."""

from __future__ import annotations

import threading

import pytest
import torch
from folders import write
from safetensors.torch import load_file

from lox_stream import DataError, OptionError, Options, extrapolate, extrapolate_tensor
from lox_stream.for_compressed_tensors import LoxConverter
from lox_stream.options import Rule
from lox_stream.synthetic import pair_of

CONFIG = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
SHAPES = {
    "model.embed_tokens.weight": (80, 32),
    "model.layers.0.self_attn.qkv_proj.weight": (64, 32),
    "model.layers.0.mlp.experts.down_proj": (3, 40, 32),
    "model.layers.0.mlp.gate.weight": (4, 32),
    "model.layers.0.norm.weight": (32,),
    "visual.patch_embed.proj.weight": (24, 3, 4, 4),
    "big.weight": (900, 1300),
}


def pairs(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in SHAPES.items():
        w0, w1 = pair_of(shape[0], max(1, torch.Size(shape[1:]).numel()), generator, dtype=dtype)
        found[name] = tuple((w.view(shape) if len(shape) > 1 else w[:, 0].contiguous()) for w in (w0, w1))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(rank=0, alpha=0.5),
        Options(rank=3, split_fused=True, rounding="stochastic"),
        Options(skip=("*embed*",), recipe=(Rule("*big*", rank=2, alpha=0.3),)),
    ],
    ids=["plain", "full rank", "parts, stochastic", "rules"],
)
def test_it_is_what_run_writes(options, dtype, tmp_path):
    both = pairs(dtype)
    folders = [
        write(tmp_path / side, {name: pair[i] for name, pair in both.items()}, **CONFIG)
        for i, side in enumerate(("base", "aligned"))
    ]
    out = load_file(extrapolate(*folders, tmp_path / "out", options=options).out / "model.safetensors")
    for name, (w0, w1) in both.items():
        made = extrapolate_tensor(name, w1, w0, options=options, config=CONFIG)
        assert torch.equal(made, out[name]), name


def test_strides_threads_and_the_callers_torch_change_nothing(one_thread):
    w0, w1 = pairs(torch.bfloat16)["big.weight"]
    right = extrapolate_tensor("big.weight", w1, w0)
    turned = extrapolate_tensor("big.weight", w1.T.contiguous().T, w0.T.contiguous().T, options=Options(threads=1))
    assert torch.equal(turned, right)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(extrapolate_tensor("big.weight", w1, w0))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, right) for one in found)
    assert torch.get_num_threads() == 1
    assert threading.active_count() == 1


def test_what_does_not_change_is_aligned_itself():
    w0, w1 = pairs(torch.bfloat16)["model.embed_tokens.weight"]
    name = "model.embed_tokens.weight"
    assert extrapolate_tensor(name, w1, w1.clone()) is w1
    assert extrapolate_tensor(name, w1, w0, options=Options(alpha=0.0)) is w1
    assert extrapolate_tensor("norm.weight", w1[0], w0[0]) is not None
    assert extrapolate_tensor(name, w1.to("meta"), w0.to("meta")).is_meta


def test_what_does_not_fit_is_said():
    w0, w1 = pairs(torch.bfloat16)["model.embed_tokens.weight"]
    with pytest.raises(OptionError, match=r"w\.weight: aligned is \(80, 32\), base \(79, 32\); expected one shape"):
        extrapolate_tensor("w.weight", w1, w0[:79])
    with pytest.raises(OptionError, match=r"dtype of base is torch\.int8"):
        extrapolate_tensor("w.weight", w1, w0.to(torch.int8))
    with pytest.raises(OptionError, match=r"expected 'same' and 'weights' for one tensor\. Cast both"):
        extrapolate_tensor("w.weight", w1, w0, options=Options(dtype="float32"))
    with pytest.raises(OptionError, match="base is a NoneType, expected a torch tensor"):
        extrapolate_tensor("w.weight", w1, None)
    with pytest.raises(OptionError, match="--rank is -1"):
        extrapolate_tensor("w.weight", w1, w0, options=Options(rank=-1))
    bad = w1.clone()
    bad[2, 3] = float("inf")
    with pytest.raises(DataError, match=r"aligned has inf at \[2, 3\]"):
        extrapolate_tensor("w.weight", bad, w0)
    assert extrapolate_tensor("w.weight", bad, w0, options=Options(on_nonfinite="copy")) is bad


def test_a_converter_does_it_shard_by_shard(tmp_path):
    """By the protocol of compressed-tensors, whose own loop runs it in `make examples`."""
    both = pairs(torch.bfloat16)
    folders = [
        write(tmp_path / side, {name: pair[i] for name, pair in both.items()}, **CONFIG)
        for i, side in enumerate(("base", "aligned"))
    ]
    out = load_file(extrapolate(*folders, tmp_path / "out").out / "model.safetensors")
    converter = LoxConverter(*folders)
    shard = load_file(folders[1] / "model.safetensors")
    for names in (list(shard)[:3], list(shard)[3:]):
        made = converter.process({name: shard[name] for name in names})
        assert list(made) == names
        assert all(torch.equal(made[name], out[name]) for name in names)
    on_meta = {name: tensor.to("meta") for name, tensor in shard.items()}
    assert converter.validate(on_meta) == on_meta
    assert converter.get_dependencies("big.weight") == set()
    with pytest.raises(OptionError, match="are for the files that lox-stream writes"):
        LoxConverter(*folders, options=Options(dtype="float32"))
