"""An adapter laid over its base: the aligned model that the two make, and what happens to each of its tensors."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from lox_stream.adapters import CONFIG, MERGED, Adapter, Factors, Module, own_name
from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, TensorInfo
from lox_stream.fused import parts_of
from lox_stream.matching import Step, alpha_warnings, decide, tie_problems
from lox_stream.names import counted, listing, matches, near_misses, printable
from lox_stream.options import Options, options_for
from lox_stream.output_rules import MODEL_CARD
from lox_stream.pairing import WRAPPERS, renamed
from lox_stream.quantisation import FLOATS, quantisation_problems, quantised_tensors
from lox_stream.scales import scaled_weights
from lox_stream.stacked import apart, is_transposed, stored
from lox_stream.ties import EMBEDDINGS, HEADS, says_tied, tie_warnings, tied_names

_PIECE = 1 << 20  # elements that are compared at a time
_TYPE_CODES = {2: "H", 4: "I", 8: "Q"}  # of arrays, by the bytes of an element
_TURNED_BY = re.compile(r"0\.(1[0-8]|\d)\.|0\.19\.0")  # versions of PEFT that have all stacks turned


@dataclass(frozen=True, slots=True)
class _Home:
    """Which of a module's factors change a tensor of base."""

    module: Module
    shape: tuple[int, ...]  # that they have to multiply to
    stacked: bool = False  # one matrix of several
    number: int = 0  # of it
    rows: tuple[int, int] | None = None  # of it


def laid_over(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The aligned model: base's layout, and its companions but for those that the adapter brings.

    Model cards are neither's: base's is of another model, and the adapter's of one that PEFT loads.
    """
    brought = adapter.overlay.companions if base.root.is_dir() else ()
    companions = {*base.companions, *brought} - {Path(MODEL_CARD)}
    overlay = replace(adapter.overlay, companions=brought)
    return replace(base, root=overlay.folder, companions=tuple(sorted(companions)), warnings=(), overlay=overlay)


def match_adapter(
    base: Checkpoint, adapter: Adapter, options: Options
) -> tuple[tuple[Step, ...], list[str], list[str]]:
    """Steps in the order of base's shards and offsets, all problems, and warnings; complete messages."""
    called, problems = renamed(base, options.rename)
    adapter = _once(adapter, called, tied_names(base))
    homes, lost = _homes(adapter, called)
    problems += [*lost, *_whole_problems(adapter, called)]
    factors = _factors(adapter, homes, base.config, problems)
    leaders = tied_names(base)
    problems += _head_problems(base, leaders, factors)
    factors |= {name: factors[leader] for name, leader in leaders.items() if leader in factors}
    steps = tuple(
        _step(tensor, factors.get(tensor.name), leaders.get(tensor.name, tensor.name), options)
        for shard in base.shards
        for tensor in shard.tensors
    )
    problems += [*quantisation_problems("base", base, quantised_tensors(base), factors), *_scale_problems(base)]
    problems += [
        f"{printable(name)}: dtype of base is {base.tensors[name].dtype}, expected F64, F32, F16 or BF16. {MERGED}"
        for name in factors
        if base.tensors[name].dtype not in FLOATS
    ]
    problems += _fused_problems(base, steps, options)
    problems += tie_problems(base, {step.name for step in steps if step.action == "extrapolate"})
    return steps, problems, [*alpha_warnings(options), *_warnings(base, factors, leaders), *tie_warnings(base)]


def _once(adapter: Adapter, called: Mapping[str, TensorInfo], leaders: Mapping[str, str]) -> Adapter:
    """The adapter without the factors of a head that it has under another name too, or that its embedding has.

    A tied head changes with its embedding.
    """
    embeddings = [module for module in adapter.modules if module.embeds]
    heads = [module for module in adapter.modules if matches(module.changes, HEADS)]

    def repeated(module: Module) -> bool:
        name, home = module.changes, _home(module.changes, called)
        if not matches(name, HEADS) or (home is not None and home.name not in leaders):
            return False
        again = home is None and any(
            one is not module and _alike(module.a, one.a) and _alike(module.b, one.b) for one in heads
        )
        return again or any(_same_turned(module.a, one.b) and _same_turned(module.b, one.a) for one in embeddings)

    return replace(adapter, modules=tuple(module for module in adapter.modules if not repeated(module)))


def _same_turned(tensor: TensorInfo, other: TensorInfo) -> bool:
    """Whether a matrix holds the same bytes as another one turned; reads them."""
    if tensor.shape != other.shape[::-1] or tensor.dtype != other.dtype or len(tensor.shape) != 2:
        return False
    flat, tall = sorted((tensor, other), key=lambda info: info.shape)
    rows, length = flat.shape
    one, turned = (array(_TYPE_CODES[DTYPE_BYTES[info.dtype]], _bytes_of(info)) for info in (flat, tall))
    return all(one[row * length : (row + 1) * length] == turned[row::rows] for row in range(rows))


def _bytes_of(tensor: TensorInfo) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.n_bytes)


def _homes(adapter: Adapter, called: Mapping[str, TensorInfo]) -> tuple[dict[str, _Home], list[str]]:
    """What changes each tensor of base, and problems."""
    homes: dict[str, _Home] = {}
    lost, problems = [], []
    for module in adapter.modules:
        changed = _changed_by(module, called)
        if not changed:
            lost.append(module.changes)
        for name, home in changed.items():
            if name in homes:
                problems.append(
                    f"adapter: {printable(module.name)} and {printable(homes[name].module.name)} both change "
                    f"{printable(name)}, expected one of them. {MERGED}"
                )
            homes.setdefault(name, home)
    if lost:
        near = near_misses(lost[0], called, 1)
        hint = f" (base has {printable(near[0])!r})" if near else ""
        problems.append(
            f"adapter: {len(lost)} of its {counted(len(adapter.modules), 'module')} for tensors that base lacks: "
            f"{listing(lost)}{hint}; expected each. Give the base that it was trained on, or name its tensors with "
            f"--rename. Where its files keep them otherwise than the model (tied heads): {MERGED}"
        )
    return homes, problems


def _changed_by(module: Module, called: Mapping[str, TensorInfo]) -> dict[str, _Home]:
    """The tensor of base that a module changes, or those of its experts where base has each by itself; by name."""
    home = _home(module.changes, called) or _home(stored(module.changes), called)
    if home is not None:
        stacked = _is_stack(home, module.b)
        whole = home.shape[1:] if stacked and home.shape[0] == module.count else home.shape
        return {home.name: _Home(module, whole, stacked)}
    found = {}
    for number, names in enumerate(apart(module.changes, module.count, called)):
        parts = [called[name] for name in names]
        whole, first = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), 0
        for part in parts:
            rows = first, first + part.shape[0]
            found[part.name] = _Home(module, whole, True, number, rows)
            first = rows[1]
    return found


def _is_stack(tensor: TensorInfo, b: TensorInfo) -> bool:
    """Whether it is a stack that factors of two dimensions change; those of a convolution have as many as it has."""
    return len(tensor.shape) == 3 and len(b.shape) == 2


def _home(name: str, called: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The tensor of that name, or the only one of that name but for a wrapper's prefix."""
    if name in called:
        return called[name]
    rests = {name.removeprefix(prefix) for prefix in WRAPPERS}
    found = {f"{prefix}{rest}" for rest in rests for prefix in WRAPPERS} & called.keys()
    return called[found.pop()] if len(found) == 1 else None


def _factors(
    adapter: Adapter, homes: Mapping[str, _Home], config: Mapping[str, Any], problems: list[str]
) -> dict[str, Factors]:
    """How each tensor changes; what does not fit becomes a problem.

    Whether a model keeps a weight turned (`Conv1D` of GPT-2) is told by shapes. Where a weight is square it is told by
    the config's fan_in_fan_out, which is one flag for all modules, and that of the last one where a model has both
    kinds: so no other weight may speak against it.
    """
    found: dict[str, Factors] = {}
    square, against = [], []
    ways = {name: _ways(home) for name, home in homes.items()}
    said = bool(adapter.config.get("fan_in_fan_out"))
    stacks_turned = _stacks_turned(adapter, homes, ways, config, problems)
    for name, home in homes.items():
        module = home.module
        if not ways[name]:
            times = f" of {module.count} matrices" * (module.count > 1)
            problems.append(
                f"{printable(name)}: base is {home.shape}, the adapter's factors{times} are {module.b.shape} and "
                f"{module.a.shape}; expected such as multiply to it. Give the base that the adapter was trained on"
            )
            continue
        if len(ways[name]) > 1 and not home.stacked:
            square.append(name)
        elif not (module.embeds or home.stacked) and ways[name][0] != said:
            against.append(name)
        turned = (stacks_turned if home.stacked else said) if len(ways[name]) > 1 else ways[name][0]
        found[name] = Factors(
            *(module.a, module.b, module.rank, module.scaling, turned), module.count, home.number, home.rows
        )
    if square and against:
        problems.append(
            f"{printable(square[0])}: is square, so that {CONFIG} has to say whether it is turned; it says "
            f"fan_in_fan_out {said}, but {listing(against)} is the other way. {MERGED}"
        )
    return found


def _ways(home: _Home) -> list[bool]:
    """Whether the factors multiply to a weight of that shape as they are (False), turned (True), or both."""
    module, shape = home.module, home.shape
    outer, inner = module.b.shape[0], module.a.shape[1:]
    if module.count > 1 and not home.stacked:
        return []
    plain = not module.embeds and (outer, *inner) == shape
    return [*[False] * plain, *[True] * ((*inner, outer) == shape and len(shape) == 2)]


def _stacks_turned(
    adapter: Adapter,
    homes: Mapping[str, _Home],
    ways: Mapping[str, list[bool]],
    config: Mapping[str, Any],
    problems: list[str],
) -> bool:
    """Whether stacks of square matrices are turned: as the other stacks are, else as the model's module says."""
    stacks = [name for name, home in homes.items() if home.stacked]
    square = [name for name in stacks if len(ways[name]) > 1]
    told = {ways[name][0] for name in stacks if len(ways[name]) == 1}
    if not square or len(told) == 1:
        return told == {True}
    said = is_transposed(square[0], homes[square[0]].shape, config)
    old = _TURNED_BY.match(str(adapter.config.get("peft_version")))
    if told or said is None or (old and not said):
        problems.append(
            f"{printable(square[0])}: holds square matrices, and nothing tells whether their factors are turned, as "
            f"those of all stacks were before PEFT 0.19.1; expected others beside it that tell. {MERGED}"
        )
    return bool(said)


def _head_problems(base: Checkpoint, leaders: Mapping[str, str], factors: Mapping[str, Factors]) -> list[str]:
    return [
        f"{printable(name)}: is tied to {printable(leaders[name])} in this model, and the adapter changes it by "
        f"itself; expected the two to stay one. Untie them in base, or: {MERGED}"
        for name in factors
        if name in leaders
    ]


def _step(tensor: TensorInfo, factors: Factors | None, seed_name: str, options: Options) -> Step:
    reason = decide(tensor, options)
    if reason == "alpha 0":
        reason = "untouched" if factors is None else "merged"
    if factors is None or reason == "empty":
        return Step(
            tensor.name, tensor, None, "copy", "untouched" if reason == "matrix" else reason, seed_name=seed_name
        )
    count, m, n = tensor.shape if _is_stack(tensor, factors.b) else (1, tensor.shape[0], prod(tensor.shape[1:]))
    rank = options_for(seed_name, options).rank
    action: Literal["extrapolate", "merge"] = "extrapolate" if reason == "matrix" else "merge"
    return Step(tensor.name, tensor, None, action, reason, rank, count, m, n, seed_name, factors=factors)


def _scale_problems(base: Checkpoint) -> list[str]:
    """A base of FP8, whose numbers alone say nothing of its weights."""
    scaled = scaled_weights(base)
    if not scaled:
        return []
    return [
        f"base: {len(scaled)} weights are of FP8: {listing(scaled)}; expected plain ones under an adapter. "
        "De-quantise the checkpoint first"
    ]


def _fused_problems(base: Checkpoint, steps: Iterable[Step], options: Options) -> list[str]:
    """Fused projections that are to be split: the factors are those of the whole."""
    split = [
        step.name
        for step in steps
        if step.factors is not None and options_for(step.seed_name, options).split_fused
        if parts_of(step.name, step.m, step.n, base.config)
    ]
    if not split:
        return []
    return [f"--split-fused: an adapter changes {listing(split)} as one matrix. Leave the option away, or: {MERGED}"]


def _warnings(base: Checkpoint, factors: Mapping[str, Factors], leaders: Mapping[str, str]) -> list[str]:
    """That a tied weight changes in both of its places, which it does not while PEFT keeps the factors apart."""
    tied = [
        name for name in factors if name in leaders.values() or (says_tied(base.config) and matches(name, EMBEDDINGS))
    ]
    return [
        f"{printable(name)}: is tied to the head or to another embedding, and changes with it, as in PEFT's merge"
        for name in tied
    ]


def _whole_problems(adapter: Adapter, called: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors that are no factors; a copy of base's own, such as PEFT saves of embeddings, is passed over."""
    others = []
    for tensor in adapter.whole:
        home = _home(own_name(tensor), called)
        if home is None or not _alike(tensor, home):
            others.append(tensor.name)
    if not others:
        return []
    return [
        f"adapter: holds tensors beside its factors: {listing(others)}; expected lora_A and lora_B, or numbers that "
        f"are those of base. {MERGED}"
    ]


def _alike(tensor: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers, in one dtype or in BF16 and F32; reads them."""
    if tensor.shape != other.shape or {tensor.dtype, other.dtype} not in ({tensor.dtype}, {"BF16", "F32"}):
        return False
    with tensor.path.open("rb") as file, other.path.open("rb") as file_of_other:
        file.seek(tensor.start)
        file_of_other.seek(other.start)
        for first in range(0, prod(tensor.shape), _PIECE):
            count = min(_PIECE, prod(tensor.shape) - first)
            pieces = file.read(count * DTYPE_BYTES[tensor.dtype]), file_of_other.read(count * DTYPE_BYTES[other.dtype])
            if pieces[0] != pieces[1] and _wide(pieces[0], count) != _wide(pieces[1], count):
                return False
    return True


def _wide(data: bytes, count: int) -> bytes:
    """So many numbers in F32, out of F32 or BF16: which are the upper halves of these."""
    if len(data) != 2 * count:
        return data
    wide = bytearray(4 * count)
    wide[2::4], wide[3::4] = data[::2], data[1::2]
    return bytes(wide)
