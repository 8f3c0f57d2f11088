"""Pairs the two catalogues by name and decides what happens to each tensor of the aligned checkpoint, and why."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeVar

from lox_stream.adapters import Factors, Pair
from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo, model_of, models_in
from lox_stream.fused import Part, fused_warnings, parts_of
from lox_stream.kinds import Kind, kind_of, stack_of
from lox_stream.names import (
    counted,
    in_quotes,
    listing,
    matches,
    near_misses,
    pattern_of,
    printable,
    shown,
    suggestion,
    unmatched,
)
from lox_stream.options import Options, options_for, rule_for
from lox_stream.pairing import Pairs, overlapping, pair
from lox_stream.quantisation import FLOATS, INTEGERS, quantisation_problems, quantised_tensors
from lox_stream.scales import Scaled, scale_names, scaled_weights
from lox_stream.tables import padding_rows
from lox_stream.ties import says_tied, tie_warnings, tied_names

Reason = (
    Kind
    | Literal[
        "integer", "skipped", "alpha 0", "empty", "missing", "other shape", "scales", "untouched", "merged", "landscape"
    ]
)
Facts = TypeVar("Facts")
_MANY = 12  # problems of one kind beyond this many become one message


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one tensor of the aligned checkpoint.

    A tensor is a stack of `count` matrices of (m, n), as `kinds.stack_of` has it, and each of these is split into
    `parts` if there are any. What lies behind them (rows of a vocabulary that base has not) is copied.
    """

    name: str
    aligned: TensorInfo
    base: TensorInfo | None  # None when copied
    action: Literal["extrapolate", "copy", "rescale", "merge", "blend"]  # rescale: scales of FP8; merge: factors alone
    reason: Reason
    rank: int = 0  # as the user gave it; 0: full rank, no SVD
    count: int = 1
    m: int = 0
    n: int = 0
    seed_name: str = ""  # seeds solver and rounding; for a tied copy the other's name, so that both get the same bytes
    parts: tuple[Part, ...] = ()  # of a fused projection that is split
    dtype: str = ""  # of the output; "": that of aligned
    scaled: Scaled | None = None  # how aligned is, where it is of FP8
    base_scaled: Scaled | None = None
    factors: Factors | None = None  # aligned is base changed by these: `aligned` says where base's tensor lies
    pairs: tuple[Pair, ...] = ()  # of an adapter that is written in place of the tensor; tied weights have several
    blend: tuple[tuple[float, TensorInfo], ...] = ()  # of a landscape: added is factor * (tensor - aligned) of each


def decide(tensor: TensorInfo, options: Options) -> Reason:
    """Why a tensor is extrapolated ("matrix") or copied (anything else), from its name, shape and dtype alone."""
    if (options.only and not matches(tensor.name, options.only)) or matches(tensor.name, options.skip):
        return "skipped"
    rule = rule_for(tensor.name, options)
    if rule is not None and rule.skip:
        return "skipped"
    if options_for(tensor.name, options).alpha == 0:
        return "alpha 0"
    if prod(tensor.shape) == 0:
        return "empty"
    if tensor.dtype in INTEGERS:
        return "integer"
    return kind_of(tensor.name, tensor.shape)


def match(base: Checkpoint, aligned: Checkpoint, options: Options) -> tuple[tuple[Step, ...], list[str], list[str]]:
    """Steps in the order of aligned's shards and offsets, all problems, and warnings; complete messages."""
    reasons = {tensor.name: decide(tensor, options) for shard in aligned.shards for tensor in shard.tensors}
    scaled, base_scaled = scaled_weights(aligned), scaled_weights(base)
    reasons |= dict.fromkeys(scale_names(scaled), "scales")
    pairs = pair(base, aligned, [name for name, reason in reasons.items() if reason == "matrix"], options.rename)
    reasons |= _left_alone(aligned, pairs.partners, options)
    padding = _padding(base, aligned, reasons, pairs.partners, options)
    steps = [
        _step(aligned, name, reason, pairs, padding, options, scaled, base_scaled) for name, reason in reasons.items()
    ]
    others = architecture_problems(base, aligned)
    problems = [*pairs.problems, *tie_problems(aligned, pairs.partners)]
    if not pairs.across:  # what wraps another model has an architecture of its own
        problems, others = [*others, *problems], []
    if _changes(options):
        problems += _weight_problems(base, aligned, reasons, pairs.partners, options, scaled, base_scaled)
    warnings = [
        *_warnings(base, pairs, options, scale_names(base_scaled)),
        *_copied_warnings(steps),
        *_fused_warnings(steps, options, scaled),
        *pairs.warnings,
        *_padding_warnings(padding, pairs.partners),
        *tie_warnings(aligned),
    ]
    return tuple(steps), problems, [*warnings, *others]


def _left_alone(aligned: Checkpoint, partners: Mapping[str, TensorInfo | None], options: Options) -> dict[str, Reason]:
    """Matrices that are copied because base has none, or one of another shape, and the user allowed that."""
    found: dict[str, Reason] = {}
    for name, partner in partners.items():
        if partner is None and options.on_missing == "copy":
            found[name] = "missing"
        elif partner is not None and options.on_shape_mismatch == "copy":
            found |= {} if partner.shape == aligned.tensors[name].shape else {name: "other shape"}
    return found


def _padding(
    base: Checkpoint,
    aligned: Checkpoint,
    reasons: Mapping[str, Reason],
    partners: Mapping[str, TensorInfo | None],
    options: Options,
) -> dict[str, int]:
    """Of tensors whose common rows are extrapolated, how many of base's last rows are padding; reads these."""
    if options.on_shape_mismatch != "overlap":
        return {}
    found = {
        name: padding_rows(partner, model_of(base, partner.name))
        for name, partner in partners.items()
        if partner is not None and reasons[name] == "matrix"
        if partner.shape != aligned.tensors[name].shape and overlapping(aligned.tensors[name].shape, partner.shape)
    }
    return {name: count for name, count in found.items() if count}


def _padding_warnings(padding: Mapping[str, int], partners: Mapping[str, TensorInfo | None]) -> list[str]:
    shapes = {name: partner.shape for name in padding if (partner := partners[name]) is not None}
    return [
        f"{printable(name)}: the last {padding[name]} of base's {rows} rows are padding and count as absent: the first "
        f"{rows - padding[name]} are what both sides may have in common"
        for name, (rows, _) in shapes.items()
    ]


def _step(
    aligned: Checkpoint,
    name: str,
    reason: Reason,
    pairs: Pairs,
    padding: Mapping[str, int],
    options: Options,
    scaled: Mapping[str, Scaled],
    base_scaled: Mapping[str, Scaled],
) -> Step:
    tensor, partner, seed_name = aligned.tensors[name], pairs.partners.get(name), pairs.leaders.get(name, name)
    if reason != "matrix":
        return Step(name, tensor, None, "copy", reason, seed_name=seed_name, scaled=scaled.get(name))
    config = model_of(aligned, name).config
    count, m, n = stack_of(name, tensor.shape, config)
    if partner is not None and partner.shape != tensor.shape and overlapping(tensor.shape, partner.shape):
        count, m = 1, min(tensor.shape[0], partner.shape[0] - padding.get(name, 0))
    own = options_for(seed_name, options)
    parts = parts_of(name, m, n, config) if own.split_fused and name not in scaled else ()
    return Step(
        *(name, tensor, partner, "extrapolate", reason, own.rank, count, m, n, seed_name, parts),
        scaled=scaled.get(name),
        base_scaled=None if partner is None else base_scaled.get(partner.name),
    )


def _changes(options: Options) -> bool:
    """Whether anything may be extrapolated."""
    return options.alpha != 0 or any(rule.alpha for rule in options.recipe)


def _weight_problems(
    base: Checkpoint,
    aligned: Checkpoint,
    reasons: Mapping[str, Reason],
    pairs: Mapping[str, TensorInfo | None],
    options: Options,
    scaled: Mapping[str, Scaled],
    base_scaled: Mapping[str, Scaled],
) -> list[str]:
    """Quantised, missing, of another shape, of a dtype that cannot be computed with."""
    schemes, base_schemes = quantised_tensors(aligned), quantised_tensors(base)
    used = [name for name, reason in reasons.items() if reason in ("matrix", "integer")]
    plain = [aligned.tensors[name] for name in pairs if name not in schemes and reasons[name] == "matrix"]
    missing = [tensor.name for tensor in plain if pairs[tensor.name] is None]
    used_base = dict.fromkeys(partner.name for partner in pairs.values() if partner is not None)
    return [
        *quantisation_problems("aligned", aligned, schemes, used),
        *quantisation_problems("base", base, base_schemes, base_schemes if missing else used_base),
        *_missing_problems(base, missing),
        *_shape_problems(plain, pairs, _may_overlap(options, scaled)),
        *_dtype_problems(plain, pairs, base_schemes, {"aligned": scaled, "base": base_scaled}),
    ]


def covered(step: Step) -> int:
    """Of an extrapolated tensor's elements, those of its matrices; what lies behind them is copied."""
    return step.count * step.m * step.n


def rescaled(step: Step) -> bool:
    """Whether a weight of FP8 is written with fresh scales."""
    return step.scaled is not None and step.action == "extrapolate" and not step.dtype and not step.pairs


def written_names(step: Step) -> tuple[str, ...]:
    """The tensors of the output that a step writes: its own, or the factors of an adapter."""
    return tuple(info.name for pair in step.pairs for info in (pair.b, pair.a)) or (step.name,)


def with_fresh_scales(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, of which those of scales say whether these are made anew."""
    fresh = {step.scaled.scale.name for step in steps if step.scaled is not None and rescaled(step)}
    return tuple(replace(step, action="rescale") if step.name in fresh else step for step in steps)


def whole_pairs(steps: Iterable[Step], finished: Mapping[str, Facts]) -> dict[str, Facts]:
    """What is finished, without what is made at once with something that is not: FP8 and its scales, two factors."""
    steps = tuple(steps)
    groups: list[tuple[str, ...]] = [
        (step.name, step.scaled.scale.name) for step in steps if step.scaled and rescaled(step)
    ]
    groups += [written_names(step) for step in steps if step.pairs]
    halves = {name for group in groups for name in group if not finished.keys() >= set(group)}
    return {name: facts for name, facts in finished.items() if name not in halves}


def output_bytes(step: Step) -> int:
    """Bytes of the tensor in the output, or of the factors that stand for it."""
    if step.pairs:
        return sum(info.n_bytes for pair in step.pairs for info in (pair.a, pair.b))
    return prod(step.aligned.shape) * DTYPE_BYTES[step.dtype] if step.dtype else step.aligned.n_bytes


def glob_problems(aligned: Checkpoint, options: Options) -> list[str]:
    """A message for each glob that matches no tensor, with those that may have been meant."""
    problems = []
    for option, globs in (("--skip", options.skip), ("--only", options.only)):
        for glob in unmatched(globs, aligned.tensors):
            near = near_misses(glob, aligned.tensors) or tuple(dict.fromkeys(map(pattern_of, aligned.tensors)))[:2]
            hint = suggestion(near)
            if says_tied(aligned.config) and matches("lm_head.weight", (glob,)):
                hint = f"The head is tied to the embedding in this model and has no weights of its own. {hint}"
            problems.append(
                f"{option} {glob!r} matches no tensor of {printable(aligned.root)}; expected one at least. {hint}"
            )
    return [*problems, *_scale_problems(aligned, options), *_rule_problems(aligned, options)]


def _scale_problems(aligned: Checkpoint, options: Options) -> list[str]:
    """Globs that match nothing but scales of FP8, which follow their weights."""
    if not (options.skip or options.only):
        return []
    scales = scale_names(scaled_weights(aligned))
    others = [name for name in aligned.tensors if name not in scales]
    return [
        f"{option} {glob!r} matches nothing but scales of FP8, which are made anew with their weights; expected the "
        "weights too. Name these"
        for option, globs in (("--skip", options.skip), ("--only", options.only))
        for glob in globs
        if unmatched((glob,), others) and not unmatched((glob,), scales)
    ]


def _rule_problems(aligned: Checkpoint, options: Options) -> list[str]:
    """Rules of a recipe that count for no tensor."""
    counting = {id(rule_for(name, options)) for name in aligned.tensors} if options.recipe else set()
    problems = []
    for number, rule in enumerate(options.recipe, 1):
        if id(rule) in counting:
            continue
        hint = suggestion(near_misses(rule.match, aligned.tensors))
        if not unmatched((rule.match,), aligned.tensors):
            hint = "Earlier rules match all of its tensors, and the first that matches counts: move it up"
        at = rule.at or f"recipe, rule {number}"
        problems.append(
            f"{at}: match {rule.match!r} hits no tensor of {printable(aligned.root)}; expected one at least. {hint}"
        )
    return problems


def architecture_problems(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    """The two configs name different architectures."""
    others = {model.prefix: model for model in models_in(base)}
    return [
        problem
        for model in models_in(aligned)
        if model.prefix in others and (problem := _architecture_problem(others[model.prefix], model))
    ]


def _architecture_problem(base: Checkpoint, aligned: Checkpoint) -> str:
    for key in ("architectures", "model_type"):
        found, expected = aligned.config.get(key), base.config.get(key)
        if found and expected and found != expected:
            return (
                f"{printable(aligned.prefix)}config.json: {key} of aligned is {shown(found)}, of base "
                f"{shown(expected)}; expected the same. Give as base the model that aligned was fine-tuned from; if it "
                "is and only config.json is wrong, correct it there"
            )
    return ""


def tie_problems(aligned: Checkpoint, changed: Container[str]) -> list[str]:
    """Tied names of which the globs leave only one to be changed."""
    return [
        f"{printable(name)} and {printable(leader)} are one tied weight, but --skip or --only leaves only one of them "
        "to be changed; expected both or none. Name both, or neither"
        for name, leader in tied_names(aligned).items()
        if (name in changed) != (leader in changed)
    ]


def _missing_problems(base: Checkpoint, names: list[str]) -> list[str]:
    """One message for all tensors that base lacks, since these are often many."""
    if not names:
        return []
    globs = " ".join(f"--skip {in_quotes(pattern)}" for pattern in dict.fromkeys(map(pattern_of, names)))
    own_name = names[0].split(".")[-2:]
    alike = [name for name in base.tensors if name.split(".")[-2:] == own_name]
    near = near_misses(names[0], alike, 1)
    hint = f" (base has {printable(near[0])!r}: are its names built otherwise?)" if near else ""
    return [
        f"{printable(base.root)}: {counted(len(names), 'tensor')} of aligned missing in base: {listing(names)}{hint}; "
        "expected each. Give the model that aligned was fine-tuned from, pair them with --rename, or copy them "
        f"unchanged: --on-missing copy, or {globs}"
    ]


def _may_overlap(options: Options, scaled: Container[str]) -> Callable[[TensorInfo], bool]:
    """Whether the rows of a tensor that both have may be extrapolated: not where others share their scales."""
    if options.on_shape_mismatch != "overlap":
        return lambda tensor: False
    return lambda tensor: tensor.name not in scaled or options.dtype != "same"


def _shape_problems(
    tensors: Iterable[TensorInfo], pairs: Mapping[str, TensorInfo | None], overlap: Callable[[TensorInfo], bool]
) -> list[str]:
    problems: list[str] = []
    more: list[str] = []
    for tensor in tensors:
        partner = pairs[tensor.name]
        if (
            partner is None
            or partner.shape == tensor.shape
            or (overlap(tensor) and overlapping(tensor.shape, partner.shape))
        ):
            continue
        name, both = printable(tensor.name), ""
        if overlapping(tensor.shape, partner.shape):
            both = ", or extrapolate the rows that both have: --on-shape-mismatch overlap"
            both += ", of FP8 together with --dtype, for its rows share scales" * (tensor.dtype not in FLOATS)
        if len(problems) < _MANY:
            problems.append(
                f"{name}: aligned is {tensor.shape}, base is {partner.shape}; expected the same shape. "
                f"Copy it unchanged with --skip {in_quotes(name)}, or all such with --on-shape-mismatch copy{both}"
            )
        else:
            more.append(name)
    if more:
        problems.append(
            f"{counted(len(more), 'more tensor')} of another shape: {listing(more)}; expected the same shapes. "
            "Give the model that aligned was fine-tuned from"
        )
    return problems


def _dtype_problems(
    tensors: Iterable[TensorInfo],
    pairs: Mapping[str, TensorInfo | None],
    base_schemes: Mapping[str, str],
    scaled: Mapping[str, Mapping[str, Scaled]],
) -> list[str]:
    problems: dict[str, None] = {}
    for tensor in tensors:
        for side, info in (("aligned", tensor), ("base", pairs[tensor.name])):
            if info is None or info.dtype in FLOATS or info.name in scaled[side]:
                continue
            if side == "aligned" or info.name not in base_schemes:
                pattern = pattern_of(printable(tensor.name))
                problems[
                    f"{pattern}: dtype of {side} is {info.dtype}, expected F64, F32, F16 or BF16. "
                    f"Copy it unchanged with --skip {in_quotes(pattern)}"
                ] = None
    return list(problems)


def _copied_warnings(steps: Sequence[Step]) -> list[str]:
    """Which matrices are left as they are because the user allowed it for whatever does not fit."""
    found = {why: [step.name for step in steps if step.reason == why] for why in ("missing", "other shape")}
    has = {"missing": "has none", "other shape": "has another shape"}
    return [
        f"{counted(len(names), 'tensor')} not extrapolated, for base {has[why]}: {listing(names)}"
        for why, names in found.items()
        if names
    ]


def _fused_warnings(steps: Iterable[Step], options: Options, scaled: Container[str]) -> list[str]:
    asked = [
        step for step in steps if step.action == "extrapolate" and options_for(step.seed_name, options).split_fused
    ]
    return fused_warnings([step.name for step in asked if not step.parts], scaled)


def _warnings(base: Checkpoint, pairs: Pairs, options: Options, scales: Container[str]) -> list[str]:
    warnings = alpha_warnings(options)
    if not pairs.partners and _changes(options):
        other = "" if options.dtype == "same" else f", as {options.dtype}"
        warnings.append(f"no tensor is extrapolated: the output will be a copy of aligned{other}")
    unused = [name for name in pairs.unused if name not in scales]
    if unused:
        warnings.append(
            f"{printable(base.root)}: {counted(len(unused), 'tensor')} not in aligned and not used: {listing(unused)}"
        )
    return warnings


def alpha_warnings(options: Options) -> list[str]:
    """That a factor is negative."""
    return [
        f"alpha is {alpha}: a negative factor takes alignment away instead of adding to it"
        for alpha in dict.fromkeys([options.alpha, *(rule.alpha for rule in options.recipe)])
        if alpha is not None and alpha < 0
    ]
