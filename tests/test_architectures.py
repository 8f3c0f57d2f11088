"""Each architecture of the zoo, saved by its own library, extrapolated, loaded again, and held against an oracle.

The oracle knows modules and no names of tensors: what a loaded model multiplies with is a matrix, by its module's type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]  # warnings of other libraries are theirs
transformers = pytest.importorskip("transformers", reason="`make compat` has an environment with it")

import apart  # noqa: E402
import exactly  # noqa: E402
from models import loaded, moved  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402
from zoo import FUSED, NOT_IN_PEFT, ZOO, stable_diffusion  # noqa: E402

from lox_stream import Options, extrapolate  # noqa: E402

RANK, ALPHA = 2, 1.25
MATRICES = (nn.Linear, nn.Embedding, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
LOOKUPS = {
    "position_embedding",
    "position_embeddings",
    "relative_position_bias_table",
    "latents",
    "positional_embedding",
    "rel_pos_h",
    "rel_pos_w",
    "emb_rel_k",
    "emb_rel_v",
}  # tables that are no module
MODELS = {**ZOO, **NOT_IN_PEFT}
AS_LOADED = {
    "save_original_format": False
}  # as transformers 5 has its modules: experts in one tensor of three dimensions
CONVERTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "jamba", "dbrx")
UNCHANGED = {"A_log", "scale_shift_table", "mask_token", "translate", "log_scale"}


def extrapolated(w1: Tensor, w0: Tensor) -> Tensor:
    """By LAPACK in float64, of matrices or stacks of them."""
    return exactly.extrapolated(w1, w0, RANK, ALPHA)


def expected(module: nn.Module, name: str, w1: Tensor, w0: Tensor, apart: bool) -> Tensor:
    """What a parameter of a loaded module has to become."""
    if w1.ndim < 2 or name in UNCHANGED or name.endswith("bias"):
        return w1
    if isinstance(module, CONVOLUTIONS):
        return w1 if w1.shape[1] == 1 else extrapolated(w1.flatten(1), w0.flatten(1)).view(w1.shape)
    kind = type(module).__name__
    if kind == "XLNetRelativeAttention":  # (in, heads, head)
        return extrapolated(w1.flatten(1), w0.flatten(1)).view(w1.shape)
    if kind == "SamVisionEncoder":  # (1, h, w, dim)
        return extrapolated(w1.flatten(0, 2), w0.flatten(0, 2)).view(w1.shape)
    if isinstance(module, MATRICES) or name in (*LOOKUPS, "in_proj_weight") or kind.endswith(("Router", "Rglru")):
        return extrapolated(w1, w0)
    if w1.ndim == 3 and ("Expert" in kind or "Moe" in kind or "MoE" in kind):
        if apart and name == "gate_up_proj":  # two tensors of the file, which transformers loads as one
            halves = [extrapolated(a, b) for a, b in zip(w1.chunk(2, 1), w0.chunk(2, 1), strict=True)]
            return torch.cat(halves, 1)
        return extrapolated(w1, w0)
    if kind == "DbrxExpertGLU":
        stacks = [weight.view(module.moe_num_experts, -1, weight.shape[1]) for weight in (w1, w0)]
        return extrapolated(*stacks).reshape(w1.shape)
    if kind == "ParametrizationList" or kind.startswith("Rwkv") or sum(side > 1 for side in w1.shape) < 2:
        return w1
    raise AssertionError(f"the oracle does not know {name} {tuple(w1.shape)} of a {kind}")


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}", module, name, parameter.detach()


def run(made: nn.Module, folder: Path, options: Options, **how: object) -> tuple[list[nn.Module], dict[str, dict]]:
    """base, aligned and what came out, as their library loads them; and the manifest's rows."""
    made.save_pretrained(folder / "base", **how)
    moved(made).save_pretrained(folder / "aligned", **how)
    summary = extrapolate(*(folder / side for side in ("base", "aligned", "out")), options=options)
    assert summary.totals.extrapolated > 0
    rows = json.loads((folder / "out" / "lox_stream.json").read_text())["tensors"]
    return [loaded(type(made), folder / side) for side in ("base", "aligned", "out")], rows


def check(where: str, w: Tensor, right: Tensor, w1: Tensor) -> None:
    tolerance = 4e-5 * float((right - w1).norm()) + 4 * torch.finfo(torch.float32).eps * float(w1.norm())
    assert float((w - right).norm()) <= tolerance, f"{where} {tuple(w1.shape)}"
    assert torch.equal(w, w1) == torch.equal(right, w1.double()), f"{where} is changed, or is not"


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(pytest.param(name, {}, id=name) for name in MODELS),
        *(pytest.param(name, AS_LOADED, id=f"{name}, as loaded") for name in CONVERTED),
    ],
)
def test_what_a_model_multiplies_with_is_extrapolated_and_it_loads_again(name, how, tmp_path):
    torch.manual_seed(0)
    (base, aligned, out), rows = run(MODELS[name]().float(), tmp_path, Options(RANK, ALPHA), **how)
    apart = any(".experts.0." in name for name in rows)
    given = zip(parameters(base), parameters(aligned), parameters(out), strict=True)
    for (_, _, _, w0), (where, module, own, w1), (_, _, _, w) in given:
        check(where, w, expected(module, own, w1, w0, apart), w1)
    assert not math.isnan(sum(float(parameter.sum()) for parameter in out.parameters()))


def split(cut: list[Tensor], w1: Tensor, w0: Tensor) -> Tensor:
    """Extrapolated part by part; `cut` are the parts of a tensor of places."""
    right = torch.empty(w1.numel(), dtype=torch.float64)
    for places in cut:
        matrices = places if w1.ndim == 3 else places.reshape(-1, places.shape[-1])
        pair = (weight.flatten()[matrices.flatten()].view(matrices.shape) for weight in (w1, w0))
        right[matrices.flatten()] = extrapolated(*pair).flatten()
    return right.view(w1.shape)


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_fused_projections_are_extrapolated_each_by_itself(name, tmp_path):
    torch.manual_seed(0)
    (base, aligned, out), rows = run(FUSED[name]().float(), tmp_path, Options(RANK, ALPHA, split_fused=True))
    given = zip(parameters(base), parameters(aligned), parameters(out), strict=True)
    for (_, _, _, w0), (where, module, own, w1), (_, _, _, w) in given:
        parent, _, child = where.removesuffix(f".{own}").rpartition(".")
        places = torch.arange(w1.numel()).view(w1.shape)
        cut = apart.parts(aligned.get_submodule(parent), module, child, own, places)
        right = expected(module, own, w1, w0, False) if cut is None else split(cut, w1, w0)
        check(where, w, right, w1)
    assert any("parts" in row for row in rows.values()) == (name != "llama")


@pytest.mark.parametrize("max_shard_size", ["10GB", "60KB"])
def test_all_components_of_a_pipeline_are_extrapolated_and_it_loads_again(max_shard_size, tmp_path):
    torch.manual_seed(0)
    made = stable_diffusion()
    made.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
    components = ("unet", "vae", "text_encoder")
    for name in components:
        setattr(made, name, moved(getattr(made, name)))
    made.save_pretrained(tmp_path / "aligned", max_shard_size=max_shard_size)
    extrapolate(*(tmp_path / side for side in ("base", "aligned", "out")), options=Options(RANK, ALPHA))
    assert (max_shard_size == "60KB") == bool(list((tmp_path / "out" / "unet").glob("*.index.json")))
    absent = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    base, aligned, out = (
        type(made).from_pretrained(tmp_path / side, torch_dtype=torch.float32, **absent)
        for side in ("base", "aligned", "out")
    )
    assert out.scheduler.config == aligned.scheduler.config
    for name in components:
        given = zip(*(parameters(getattr(side, name)) for side in (base, aligned, out)), strict=True)
        for (_, _, _, w0), (where, module, own, w1), (_, _, _, w) in given:
            check(f"{name}{where}", w, expected(module, own, w1, w0, False), w1)
