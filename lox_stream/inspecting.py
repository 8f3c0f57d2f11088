"""What a checkpoint holds and what `run` would do with each tensor: the data behind `lox-stream inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lox_stream.adapters import Adapter, Module, is_adapter, open_adapter
from lox_stream.checkpoint import Checkpoint, TensorInfo, model_of, models_in, open_checkpoint
from lox_stream.errors import OptionError
from lox_stream.fused import Parts, fused_warnings, parts_of
from lox_stream.kinds import stack_of
from lox_stream.matching import decide, glob_problems
from lox_stream.names import matches, pattern_of, place_name, printable
from lox_stream.options import Options, Rule, check_options, options_for, rule_for, said_by
from lox_stream.quantisation import FLOATS, quantisation_method, quantised_tensors
from lox_stream.scales import scale_names, scaled_weights
from lox_stream.ties import EMBEDDINGS, HEADS, says_tied, tie_warnings, tied_names

_DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    shard: str
    group: str  # the name with its numbers as stars
    action: str  # "extrapolate" | "copy" | "rescale" | "refuse"
    reason: str  # as in a plan; for "refuse" the quantisation scheme or the dtype
    parts: tuple[str, ...] = ()  # of a fused projection that `run` would split


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names differ in numbers only: the layers of one module."""

    pattern: str
    count: int
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    n_bytes: int
    actions: tuple[str, ...]
    reasons: tuple[str, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """What a rule of a recipe counts for."""

    match: str
    says: str
    tensors: int
    matrices: int  # of these, tensors that `run` would extrapolate or that the rule keeps it from
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint in numbers."""

    path: Path
    n_shards: int
    architecture: str | None  # from config.json
    n_elements: int
    n_bytes: int
    bytes_by_dtype: dict[str, int]
    bytes_by_action: dict[str, int]
    rows: tuple[Row, ...]  # by shard and offset
    groups: tuple[Group, ...]  # in the order of their first tensor
    tied: dict[str, str]  # name -> the name that holds its weights, stored or not
    says_tied: bool | None  # tie_word_embeddings of config.json
    quantisation: dict[str, int]  # scheme -> tensors
    quantisation_method: str | None  # from config.json
    companions: tuple[Path, ...]
    warnings: tuple[str, ...]
    rules: tuple[Hit, ...] = ()


def inspect_checkpoint(path: str | Path, options: Options = _DEFAULTS) -> Inspection:
    """Look at a checkpoint's headers; raises CheckpointError where it cannot be read, OptionError for the globs.

    What `run` does with a tensor is said from this side alone: a base that lacks it is another matter.
    """
    check_options(options)
    if is_adapter(path):
        return _inspect_adapter(open_adapter(path), options)
    checkpoint = open_checkpoint(path)
    problems = glob_problems(checkpoint, options)
    if problems:
        raise OptionError("\n".join(problems))
    schemes, scaled = quantised_tensors(checkpoint), scaled_weights(checkpoint)
    scales = dict.fromkeys(scale_names(scaled), "copy")
    scales |= {
        one.scale.name: "rescale"
        for name, one in scaled.items()
        if decide(checkpoint.tensors[name], options) == "matrix"
    }
    rows = tuple(
        _row(
            *(tensor, shard.name, options, schemes.get(tensor.name), model_of(checkpoint, tensor.name).config),
            fp8=tensor.name in scaled,
            scales=scales.get(tensor.name),
        )
        for shard in checkpoint.shards
        for tensor in shard.tensors
    )
    return Inspection(
        path=checkpoint.root,
        n_shards=len(checkpoint.shards),
        architecture=_architecture(checkpoint.config),
        n_elements=sum(prod(row.shape) for row in rows),
        n_bytes=sum(row.n_bytes for row in rows),
        bytes_by_dtype=_sums((row.dtype, row.n_bytes) for row in rows),
        bytes_by_action=_sums((row.action, row.n_bytes) for row in rows),
        rows=rows,
        groups=_groups(rows),
        tied=tied_weights(checkpoint),
        says_tied=says_tied(checkpoint.config),
        quantisation=_sums((scheme, 1) for scheme in schemes.values()),
        quantisation_method=quantisation_method(checkpoint.config),
        companions=checkpoint.companions,
        warnings=(
            *checkpoint.warnings,
            *fused_warnings(_unsplit(rows, options), scaled),
            *tie_warnings(checkpoint),
        ),
        rules=tuple(_hit(rule, rows, options) for rule in options.recipe),
    )


def _inspect_adapter(adapter: Adapter, options: Options) -> Inspection:
    """Each module's factors as one row: the weight that they change, as base's module has it, and their own bytes."""
    weights, base = adapter.overlay.files[-1], adapter.config.get("base_model_name_or_path")
    rows = tuple(_adapter_row(module, weights.name) for module in adapter.modules)
    return Inspection(
        path=adapter.overlay.folder,
        n_shards=1,
        architecture=f"LoRA adapter of {printable(str(base or 'a model that is not named'))}",
        n_elements=sum(prod(factor.shape) for module in adapter.modules for factor in (module.a, module.b)),
        n_bytes=sum(row.n_bytes for row in rows),
        bytes_by_dtype=_sums((row.dtype, row.n_bytes) for row in rows),
        bytes_by_action=_sums((row.action, row.n_bytes) for row in rows),
        rows=rows,
        groups=_groups(rows),
        tied={},
        says_tied=None,
        quantisation={},
        quantisation_method=None,
        companions=adapter.overlay.companions,
        warnings=(),
        rules=tuple(_hit(rule, rows, options) for rule in options.recipe),
    )


def _adapter_row(module: Module, shard_name: str) -> Row:
    name, reason = module.changes, f"LoRA, rank {module.rank}, scaling {module.scaling:g}"
    stack = (module.count,) if module.count > 1 else ()
    shape = (*stack, module.b.shape[0], *module.a.shape[1:])
    n_bytes = module.a.n_bytes + module.b.n_bytes
    return Row(name, module.a.dtype, shape, n_bytes, shard_name, pattern_of(name), "extrapolate", reason)


def _hit(rule: Rule, rows: Sequence[Row], options: Options) -> Hit:
    hit = [row for row in rows if rule_for(row.name, options) is rule]
    says = ["skip"] if rule.skip else [f"{key} {value}" for key, value in said_by(rule).items()]
    changed = [row for row in hit if row.reason in ("matrix", "skipped", "alpha 0")]
    return Hit(rule.match, ", ".join(says), len(hit), len(changed), sum(row.n_bytes for row in hit))


def inspection_summary(inspection: Inspection) -> dict[str, Any]:
    """The same as JSON-able data, with the fields' names as keys."""
    data = asdict(inspection)
    data["path"] = place_name(inspection.path)
    data["companions"] = [path.as_posix() for path in inspection.companions]
    return data


def tied_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Each tied name and the stored name that holds its weights; a head that is not stored is `lm_head.weight`."""
    tied = tied_names(checkpoint)
    for model in models_in(checkpoint):
        heads = [name for name in model.tensors if matches(name, HEADS)]
        embeddings = [name for name in model.tensors if matches(name, EMBEDDINGS)]
        if says_tied(model.config) and not heads and embeddings:
            tied[f"{model.prefix}lm_head.weight"] = embeddings[0]
    return tied


def _architecture(config: Mapping[str, Any]) -> str | None:
    """As transformers names it, or as diffusers does."""
    said = config.get("architectures")
    return str(said[0]) if isinstance(said, list) and said else config.get("_class_name")


def _unsplit(rows: Iterable[Row], options: Options) -> Iterator[str]:
    """Names of the matrices that are to be split, if they are fused, and are not."""
    for row in rows:
        if row.action == "extrapolate" and not row.parts and options_for(row.name, options).split_fused:
            yield row.name


def _row(
    tensor: TensorInfo,
    shard_name: str,
    options: Options,
    scheme: str | None,
    config: Mapping[str, Any],
    *,
    fp8: bool,
    scales: str | None,
) -> Row:
    """`fp8`: a weight that can be computed with all the same; `scales`: of those of one, what happens to them."""
    reason: str = "scales" if scales else decide(tensor, options)
    action = scales or ("extrapolate" if reason == "matrix" else "copy")
    if scheme is not None and reason in ("matrix", "integer"):
        action, reason = "refuse", scheme
    elif reason == "matrix" and tensor.dtype not in FLOATS and not fp8:
        action, reason = "refuse", tensor.dtype
    parts: Parts = ()
    if action == "extrapolate" and options_for(tensor.name, options).split_fused and not fp8:
        parts = parts_of(tensor.name, *stack_of(tensor.name, tensor.shape, config)[1:], config)
    group = pattern_of(tensor.name)
    labels = tuple(part.label for part in parts)
    return Row(tensor.name, tensor.dtype, tensor.shape, tensor.n_bytes, shard_name, group, action, reason, labels)


def _groups(rows: Iterable[Row]) -> tuple[Group, ...]:
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(row.group, []).append(row)
    return tuple(
        Group(
            pattern,
            len(group),
            tuple(dict.fromkeys(row.dtype for row in group)),
            tuple(dict.fromkeys(row.shape for row in group)),
            sum(row.n_bytes for row in group),
            tuple(dict.fromkeys(row.action for row in group)),
            tuple(dict.fromkeys(row.reason for row in group)),
            tuple(dict.fromkeys(part for row in group for part in row.parts)),
        )
        for pattern, group in members.items()
    )


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums
