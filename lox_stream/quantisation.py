"""Recognises quantised tensors by dtype and by the names that quantisers give, so that none is taken for weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo, model_of, models_in
from lox_stream.names import in_quotes, listing, pattern_of, printable
from lox_stream.scales import WEIGHTS, misfit, scaled_weights, weight_bits

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # what can be extrapolated
INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})

_SMALL_FLOATS = re.compile(r"F[468](_|$)")
_SCALES = ("_scale", "_scale_inv", "_scales", "_scale_2", "_zero_point")  # NAME + one of these belongs to NAME
# A tensor is packed when all its partners are there: (end of its own name, its partners' ends, scheme).
_PACKED = (
    (".qweight", (".qzeros", ".scales"), "GPTQ"),
    (".qweight", (".scales",), "GPTQ"),
    ("_blocks", ("_scales",), "MXFP4"),
    ("_packed", ("_scale",), "compressed-tensors"),
    (".weight", (".weight_scale", ".weight_scale_2"), "NVFP4 of ModelOpt"),
    ("._data", ("._scale",), "quanto"),
    (".W_q", (), "HQQ"),
    (".weight", (".weight.absmax",), "bitsandbytes"),
    (".weight", (".SCB",), "bitsandbytes"),
)
_GPTQMODEL = "gptqmodel: gptqmodel.utils.model_dequant.dequantize_model(DIR, NEW)"
_WAYS = {  # to plain weights, by the first words of a scheme
    **dict.fromkeys(("GPTQ", "AWQ", "NVFP4 of ModelOpt"), _GPTQMODEL),
    "bitsandbytes": "transformers: from_pretrained(DIR), then dequantize() and save_pretrained(NEW)",
    "MXFP4": "transformers: from_pretrained(DIR, quantization_config=Mxfp4Config(dequantize=True)), then "
    "save_pretrained(NEW)",
    "compressed-tensors": "compressed_tensors.entrypoints.convert: "
    "convert_checkpoint(DIR, NEW, CompressedTensorsDequantizer(DIR))",
}


def quantised_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """The scheme of each tensor that is quantised, or a scale of one: `{"mlp.up.qweight": "GPTQ", ...}`.

    Those that can be computed with (`scaled_weights`) are not among them.
    """
    tensors = checkpoint.tensors
    known = scaled_weights(checkpoint)
    schemes: dict[str, str] = {}
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.dtype in WEIGHTS):  # these may be others' scales
        scheme, partners = _scheme(tensor, checkpoint)
        if scheme is not None and tensor.name not in known:
            for name in (tensor.name, *partners):
                schemes.setdefault(name, scheme)
    return schemes


def quantisation_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says about quantisation: the method's name, "unnamed", or None."""
    for owner in (config, config.get("text_config")):
        if isinstance(owner, Mapping):
            for key in ("quantization_config", "compression_config"):
                if owner.get(key):
                    found = owner[key].get("quant_method", "unnamed") if isinstance(owner[key], Mapping) else "unnamed"
                    return str(found)
    return None


def quantisation_problems(
    side: str, checkpoint: Checkpoint, schemes: Mapping[str, str], used: Iterable[str]
) -> list[str]:
    """One problem for each scheme among the tensors that a run would compute with (`used`), or for the config's."""
    by_scheme: dict[str, list[str]] = {}
    for name in used:
        if name in schemes:
            why = misfit(checkpoint, checkpoint.tensors[name]) if schemes[name] in WEIGHTS else ""
            by_scheme.setdefault(f"{schemes[name]} {why}".rstrip(), []).append(name)
    problems = []
    for scheme, names in by_scheme.items():
        globs = " ".join(f"--skip {in_quotes(pattern)}" for pattern in dict.fromkeys(map(pattern_of, names)))
        way = next((f" ({how})" for start, how in _WAYS.items() if scheme.startswith(start)), "")
        way_out = f"{way}, or copy them unchanged: {globs}" if side == "aligned" else way
        problems.append(
            f"{side}: quantised tensors ({scheme}): found {listing(names)}, expected float64, float32, float16 or "
            f"bfloat16. De-quantise the checkpoint first{way_out}"
        )
    for model in models_in(checkpoint):
        method = quantisation_method(model.config)
        if method is not None and not {*schemes, *scaled_weights(model)} & model.tensors.keys():
            problems.append(
                f"{side}: {printable(model.folder / 'config.json')} says that the model is quantised "
                f"({printable(method)}), expected plain weights. De-quantise the checkpoint first; "
                "if that was done, remove quantization_config from config.json"
            )
    return problems


def _scheme(tensor: TensorInfo, checkpoint: Checkpoint) -> tuple[str | None, list[str]]:
    """The scheme that a tensor is packed in, and the names that belong to it."""
    name, tensors = tensor.name, checkpoint.tensors
    scales = [name + end for end in _SCALES if name + end in tensors]
    if _SMALL_FLOATS.match(tensor.dtype):
        return tensor.dtype, scales
    if tensor.dtype not in INTEGERS or tensor.dtype == "BOOL":
        return None, []
    config = model_of(checkpoint, name).config
    for ending, partner_endings, scheme in _PACKED:
        stem = name.removesuffix(ending)
        partners = [stem + partner for partner in partner_endings]
        if stem != name and all(partner in tensors for partner in partners):
            if scheme == "GPTQ":
                scheme = _by_shape(tensor, tensors[partners[-1]], f"{stem}.g_idx" in tensors)
            elif scheme == "compressed-tensors":
                scheme = f"{scheme} {_kind(tensor, tensors[partners[0]], f'{stem}_global_scale' in tensors, config)}"
            return scheme, partners
    if scales and tensor.dtype == "I8" and quantisation_method(config) == "compressed-tensors":
        return "compressed-tensors int8", scales
    return (f"{tensor.dtype} with scales", scales) if scales else (None, [])


def _by_shape(weight: TensorInfo, scales: TensorInfo, ordered: bool) -> str:
    """GPTQ packs the rows of `(in, out)`, so that there are as many columns as scales; AWQ packs the columns."""
    return "GPTQ" if ordered or weight.shape[-1:] == scales.shape[-1:] else "AWQ"


def _kind(weight: TensorInfo, scale: TensorInfo, has_global: bool, config: Mapping[str, Any]) -> str:
    """What compressed-tensors packs: integers by eights and fewer in 32 bits, or two FP4 in a byte."""
    if weight.dtype == "U8":
        return "NVFP4" if has_global or scale.dtype == "F8_E4M3" else "MXFP4"
    bits = weight_bits(config)
    return f"int{bits.pop()}" if len(bits) == 1 else "integers"
