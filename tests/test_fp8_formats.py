"""FP8 as compressed-tensors' own code makes and reads it: pairs are made by that library, and outputs read by it."""

from __future__ import annotations

import pytest
import torch
from exactly import extrapolated
from folders import write
from safetensors.torch import load_file

from lox_stream import Options, extrapolate

pytestmark = pytest.mark.compat
NAME = "model.layers.0.mlp.up_proj.weight"
STRATEGIES = {"tensor": None, "channel": None, "block": [128, 128]}


def scheme(strategy):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, symmetric=True, block_structure=STRATEGIES[strategy]
    )


def quantised(weight, strategy):
    """(q, scale) by the library."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    blocks = weight.view(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
    lowest, highest = {
        "tensor": lambda: (weight.min().view(1), weight.max().view(1)),
        "channel": lambda: (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)),
        "block": lambda: (blocks.amin((1, 3)), blocks.amax((1, 3))),
    }[strategy]()
    scale, zero = calculate_qparams(lowest, highest, scheme(strategy))
    return quantize(weight, scale, zero, scheme(strategy), dtype=torch.float8_e4m3fn), scale


def read(folder, strategy):
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = load_file(folder / "model.safetensors")
    return dequantize(tensors[NAME], tensors[f"{NAME}_scale"], None, scheme(strategy), dtype=torch.float32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_library_reads_what_it_would_have_made_of_the_exact_result(tmp_path, strategy):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(256, 384, generator=generator)
    aligned = base + 0.004 * torch.randn(256, 3, generator=generator) @ torch.randn(3, 384, generator=generator)
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": scheme(strategy).model_dump(mode="json")}}
    q, scale = quantised(aligned, strategy)
    write(tmp_path / "aligned", {NAME: q, f"{NAME}_scale": scale}, **config)
    write(tmp_path / "base", {NAME: base})
    extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "out", options=Options(rank=2))
    exact = extrapolated(read(tmp_path / "aligned", strategy), base, 2, 1.25)
    q, scale = quantised(exact.float(), strategy)
    out = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(out[f"{NAME}_scale"], scale, rtol=1e-5, atol=0)
    assert (out[NAME].view(torch.uint8) == q.view(torch.uint8)).double().mean() > 0.999
    assert (read(tmp_path / "out", strategy) - exact).norm() < 0.04 * exact.norm()
