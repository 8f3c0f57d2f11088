"""Recognises quantised tensors by dtype and by the names that quantisers give, so that none is taken for weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lox_stream.checkpoint import Checkpoint, TensorInfo, models_in
from lox_stream.names import listing, pattern_of, printable
from lox_stream.scales import misfit, scaled_weights

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # what can be extrapolated
INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})

_SMALL_FLOATS = re.compile(r"F[468](_|$)")
_SCALES = ("_scale", "_scale_inv", "_scales", "_scale_2", "_zero_point")  # NAME + one of these belongs to NAME
# A tensor is packed when all its partners are there: (end of its own name, its partners' ends, scheme).
_PACKED = (
    (".qweight", (".qzeros", ".scales"), "GPTQ or AWQ"),
    (".qweight", (".scales",), "GPTQ or AWQ"),
    ("_blocks", ("_scales",), "MXFP4"),
    ("_packed", ("_scale",), "compressed-tensors"),
    ("._data", ("._scale",), "quanto"),
    (".W_q", (), "HQQ"),
    (".weight", (".weight.absmax",), "bitsandbytes"),
    (".weight", (".SCB",), "bitsandbytes"),
)


def quantised_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """The scheme of each tensor that is quantised, or a scale of one: `{"mlp.up.qweight": "GPTQ or AWQ", ...}`.

    Those that can be computed with (`scaled_weights`) are not among them.
    """
    tensors = checkpoint.tensors
    known = scaled_weights(checkpoint)
    schemes: dict[str, str] = {}
    for tensor in tensors.values():
        scheme, partners = _scheme(tensor, tensors)
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
            why = misfit(checkpoint, checkpoint.tensors[name])
            by_scheme.setdefault(f"{schemes[name]} {why}".rstrip(), []).append(name)
    problems = []
    for scheme, names in by_scheme.items():
        globs = " ".join(f"--skip '{printable(pattern)}'" for pattern in dict.fromkeys(map(pattern_of, names)))
        way_out = f", or copy them unchanged: {globs}" if side == "aligned" else ""
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


def _scheme(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[str | None, list[str]]:
    """The scheme that a tensor is packed in, and the names that belong to it."""
    name = tensor.name
    scales = [name + end for end in _SCALES if name + end in tensors]
    if _SMALL_FLOATS.match(tensor.dtype):
        return tensor.dtype, scales
    if tensor.dtype not in INTEGERS or tensor.dtype == "BOOL":
        return None, []
    for ending, partner_endings, scheme in _PACKED:
        stem = name.removesuffix(ending)
        partners = [stem + partner for partner in partner_endings]
        if stem != name and all(partner in tensors for partner in partners):
            return scheme, partners
    return (f"{tensor.dtype} with scales", scales) if scales else (None, [])
