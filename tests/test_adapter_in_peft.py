"""Adapters of lox-stream in PEFT itself, on each architecture of the zoo: what it loads is the update that `run` adds.

What PEFT does not take from an adapter is listed here, by architecture, and in docs/adapters.md.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]  # warnings of other libraries are theirs
peft = pytest.importorskip("peft", reason="`make compat` has an environment with it")
transformers = pytest.importorskip("transformers", reason="`make compat` has an environment with it")

from models import loaded, moved  # noqa: E402
from pages import README, ROOT, blocks  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from zoo import FUSED, ZOO, causal  # noqa: E402

from lox_stream import Options, extrapolate  # noqa: E402
from lox_stream.options import Rule  # noqa: E402
from lox_stream.synthetic import llama_shapes, write_pair  # noqa: E402

RANK, ALPHA = 2, 1.25
LEFT_OUT = (  # of a loaded model: what lox-stream leaves out for any architecture
    *("*.gate.weight", "*.router.weight", "*position_embedding*", "*embed_positions.weight", "*wpe.weight"),
    *("*relative_attention_bias.weight", "*rel_embeddings.weight", "*table", "*.latents", "*in_proj_weight"),
    *("*output_position_encodings*", "*pos_embed.weight"),
)
NOT_TAKEN = {  # globs: by PEFT 0.21 with transformers 5, or left out here, beside these
    "bert": "*word_embeddings*",  # tied to a head that is called otherwise in each kind of model
    "electra": "*word_embeddings*",
    "esm": "*word_embeddings*",
    "deberta_v2": "*word_embeddings*",
    "t5": "shared.weight",
    "bart": "model.shared.weight",
    "mamba": "*.out_proj.weight",
    "mamba2": "*.out_proj.weight",
    "falcon_h1": "*.out_proj.weight",
    "dbrx": "*.experts.*",  # one under the other in two dimensions
    "qwen2_moe": "*.mlp.experts.*",  # stacked as it is loaded, and PEFT does not stack their factors
    "jamba": "*.experts.*",
    "deepseek_v3": "*.mlp.*_proj.weight",  # PEFT takes these names for experts' where a model has both
    "qwen3_next": "*.shared_expert.*",
    "vit": "*.layers.*",  # renamed as they are loaded
    "swin": "*.blocks.*",
    "dinov2": "*.layer.*",
    "segformer": "*",
    "llava": "*.vision_tower.* *.multi_modal_projector.* lm_head.weight",
    "qwen2_vl": "*",
}


def aria() -> nn.Module:
    return causal(transformers.AriaTextConfig, moe_num_experts=4, moe_num_shared_experts=1, pad_token_id=0)


STACKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {  # whose files have experts in one tensor
    **{name: (ZOO[name], {}) for name in ("gpt_oss", "llama4", "granitemoe")},
    **{
        f"{name}, as it is loaded": (ZOO[name], {"save_original_format": False})
        for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "jamba", "qwen3_next", "granitemoe")
    },
    "qwen3_vl_moe": (FUSED["qwen3_vl_moe"], {}),
    "qwen3_vl_moe, of the hub": (FUSED["qwen3_vl_moe"], {}),
    "aria": (aria, {}),
    "aria, as it is loaded": (aria, {"save_original_format": False}),
}


def saved(model: nn.Module, folder: Path, name: str) -> Path:
    model.save_pretrained(folder, **STACKS[name][1] if name in STACKS else {})
    if name.endswith("of the hub"):
        tensors = load_file(folder / "model.safetensors")
        turned = {where: w.transpose(1, 2).contiguous() for where, w in tensors.items() if ".experts." in where}
        save_file(tensors | turned, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made(name: str, folder: Path, **how: Any) -> tuple[nn.Module, nn.Module]:
    """The aligned model and what `run` makes of it, loaded; the adapter lies in folder/adapter."""
    torch.manual_seed(0)
    base = (STACKS[name][0] if name in STACKS else ZOO[name])().float()
    pair = saved(base, folder / "base", name), saved(moved(base), folder / "aligned", name)
    extrapolate(*pair, folder / "out", options=Options(RANK, ALPHA, **how))
    extrapolate(*pair, folder / "adapter", options=Options(RANK, ALPHA, form="peft", **how))
    return loaded(type(base), folder / "aligned"), loaded(type(base), folder / "out")


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which a test of its own looks at
        return peft.PeftModel.from_pretrained(model, folder / "adapter")


def changes(wrapped: nn.Module) -> dict[str, Tensor]:
    """What PEFT adds to each parameter of the model."""
    found = {}
    for where, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "scaling", {}):
            name = f"{where}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", "")
            found[name] = module.get_delta_weight("default").detach()
    return found


@pytest.mark.parametrize("name", [*ZOO, *(name for name in STACKS if name not in ZOO)])
def test_peft_adds_what_run_adds(name, tmp_path):
    aligned, out = made(name, tmp_path)
    before = {where: weight.detach().clone() for where, weight in aligned.named_parameters()}
    found = changes(with_adapter(aligned, tmp_path))
    right = {where: weight.detach() - before[where] for where, weight in out.named_parameters()}
    expected = {where for where, change in right.items() if bool(change.any())}
    lost = {where for where in expected if where not in found or not bool(found[where].any())}
    excused = (*LEFT_OUT, *NOT_TAKEN.get(name, "").split())
    assert {where for where in lost if not any(fnmatchcase(where, glob) for glob in excused)} == set()
    assert expected - lost, "nothing was compared"
    for where in expected - lost:
        change = found[where].view(right[where].shape)
        assert float((change - right[where]).norm()) <= 1e-3 * float(right[where].norm()), where


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        *((name, "experts.gate_up_proj", "experts.down_proj") for name in ("llama4", "gpt_oss")),
        ("granitemoe", "input_linear.weight", "output_linear.weight"),
        ("mixtral, as it is loaded", "experts.gate_up_proj", "experts.down_proj"),
    ],
)
def test_some_of_the_stacks_and_each_with_an_alpha_of_its_own(name, first, last, tmp_path):
    """A module of which one parameter is changed is wrapped once, the others twice."""
    rules = Rule(f"*layers.1.*{first}", skip=True), Rule(f"*{last}", rank=1, alpha=0.5), Rule("*q_proj*", alpha=2.0)
    aligned, out = made(name, tmp_path, recipe=rules)
    before = {where: weight.detach().clone() for where, weight in aligned.named_parameters()}
    found = changes(with_adapter(aligned, tmp_path))
    assert sorted(where.rsplit("layers.")[1][0] for where in found if found[where].dim() == 3) == ["0", "0", "1"]
    for where, weight in out.named_parameters():
        if where in found:
            right = weight.detach() - before[where]
            assert float((found[where] - right).norm()) <= 1e-3 * float(right.norm()), where


OF_EXPERTS = ["gpt_oss", "llama4", "granitemoe", "aria", "mixtral, as it is loaded", "deepseek_v3, as it is loaded"]


@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [
        *((name, "float32", 1e-3) for name in ("llama", "llama, tied", "gpt2", "qwen3", "gemma2", "mpt", "bloom")),
        *((name, "float32", 1e-3) for name in OF_EXPERTS),
        *((name, "bfloat16", 2e-2) for name in ("llama", "gpt2", "gpt_oss")),  # whose rounding is 2^-9 of each number
    ],
)
def test_its_logits_are_those_of_the_merged_model(name, dtype, share, tmp_path):
    """To a thousandth of what the change does to them, in bfloat16 a fiftieth; switched off it is the aligned model."""
    aligned, _ = made(name, tmp_path, factor_dtype=dtype)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert {factor.dtype for factor in factors} == {getattr(torch, dtype)}
    manifest = json.loads((tmp_path / "adapter" / "lox_stream.json").read_text())
    how = Options(RANK, ALPHA, skip=tuple(one["name"] for one in manifest.get("left_out", [])))
    extrapolate(tmp_path / "base", tmp_path / "aligned", tmp_path / "same", options=how)
    merged = loaded(type(aligned), tmp_path / "same").eval()
    words = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before, right = aligned.eval()(words).logits.clone(), merged(words).logits
        wrapped = with_adapter(aligned, tmp_path).eval()
        assert float((wrapped(words).logits - right).norm()) <= share * float((right - before).norm())
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(words).logits, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", *OF_EXPERTS])
def test_what_peft_merges_is_what_apply_merges(name, tmp_path):
    aligned, _ = made(name, tmp_path)
    options = Options(alpha=0.0)
    tied = name == "gpt2"  # which PEFT's merge changes twice
    extrapolate(tmp_path / "aligned", tmp_path / "adapter", tmp_path / "applied", options=options)
    applied = loaded(type(aligned), tmp_path / "applied")
    before = {where: weight.detach().clone() for where, weight in aligned.named_parameters()}
    merged = with_adapter(copy.deepcopy(aligned), tmp_path).merge_and_unload()
    for (where, one), other in zip(merged.named_parameters(), applied.parameters(), strict=True):
        if tied and where == "transformer.wte.weight":
            continue
        change = float((other - before[where]).detach().norm())
        assert float((one - other).detach().norm()) <= 1e-4 * change + 1e-7 * float(before[where].norm()), where


def test_factors_that_alpha_is_folded_into_do_the_same(tmp_path):
    """The form for vLLM, whose loader cannot run here: what PEFT makes of it is what it holds."""
    aligned, out = made("llama", tmp_path)
    pair = tmp_path / "base", tmp_path / "aligned"
    extrapolate(*pair, tmp_path / "folded" / "adapter", options=Options(RANK, ALPHA, form="vllm"))
    before = {where: weight.detach().clone() for where, weight in aligned.named_parameters()}
    found = changes(with_adapter(aligned, tmp_path / "folded"))
    weights = dict(out.named_parameters())
    assert {where.rsplit(".", 2)[1] for where in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for where, change in found.items():
        right = weights[where].detach() - before[where]
        assert float((change - right).norm()) <= 1e-3 * float(right.norm()), where


def lox(folder: Path, command: str) -> None:
    ran = [sys.executable, "-P", "-m", "lox_stream", *shlex.split(command)[1:]]
    subprocess.run(ran, cwd=folder, check=True, capture_output=True, timeout=300)


def run_block(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The `model` that the page's code leaves."""
    (code,) = blocks(page, "py")
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(code, page.name, "exec"), namespace)
    return namespace["model"]


def test_readme_leads_from_pip_to_an_adapter_in_peft(tmp_path, monkeypatch, capsys):
    """Its very commands and code, but for pip: the extra that it names brings what the code imports."""
    (console,) = blocks(README, "console")
    install, *commands = re.findall(r"^\$ (.*)$", console, re.MULTILINE)
    extra = re.fullmatch(r"pip install '\.\[(\w+)\]'", install)[1]
    brought = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    imported = re.findall(r"^(?:from|import) (\w+)", blocks(README, "py")[0], re.MULTILINE)
    assert {re.split(r"\W", one)[0] for one in brought} >= {*imported}
    for command in commands:
        lox(tmp_path, command)
    found = changes(run_block(README, tmp_path, monkeypatch))
    assert "trainable params" in capsys.readouterr().out
    assert len(found) == 16, "15 matrices, of which the embedding is the head, too"
    assert all(bool(change.any()) for change in found.values())


def test_what_docs_adapters_says_of_peft_runs(tmp_path, monkeypatch):
    write_pair(tmp_path, llama_shapes(256, 512, layers=2, vocabulary=1024), aligned_shards=2)
    lox(tmp_path, "lox-stream adapter --base base --aligned aligned --out adapter")
    assert changes(run_block(ROOT / "docs" / "adapters.md", tmp_path, monkeypatch))
