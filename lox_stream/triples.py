"""The three models of a landscape, tensor by tensor, and the plan of the model at one of its points.

With d1 = lox - aligned and d2 = (finetuned - aligned) - c * d1 the model at (x, y) is aligned + x * d1 + y * d2, which
is aligned + (x - c * y) * d1 + y * (finetuned - aligned): two differences, of which a factor of 0 leaves one out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lox_stream.adapters import is_adapter
from lox_stream.checkpoint import Checkpoint, TensorInfo, companion_path
from lox_stream.companions import companion_problems
from lox_stream.matching import Step
from lox_stream.names import counted, listing, printable
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL, linked_problems, output_problems
from lox_stream.pairing import pair
from lox_stream.planning import Plan, Point, Problems, input_files
from lox_stream.quantisation import FLOATS, INTEGERS, quantisation_problems, quantised_tensors
from lox_stream.scales import scaled_weights
from lox_stream.ties import tied_names

SIDES = ("aligned", "lox", "finetuned")  # as the options are called
ITSELF = "is itself an output of lox-stream"  # as the LoX model should be
PLAIN = "float64, float32, float16 or bfloat16"


@dataclass(frozen=True, slots=True)
class Triple:
    """A tensor of floats in all three models; of the same shape."""

    aligned: TensorInfo
    lox: TensorInfo
    finetuned: TensorInfo
    follows: bool  # a second name of a tied weight, which is counted once


@dataclass(frozen=True, slots=True)
class Models:
    """The three models."""

    aligned: Checkpoint
    lox: Checkpoint
    finetuned: Checkpoint
    triples: Mapping[str, Triple]  # by aligned's names
    warnings: tuple[str, ...]

    @property
    def sides(self) -> dict[str, Checkpoint]:
        return {"aligned": self.aligned, "lox": self.lox, "finetuned": self.finetuned}


def open_models(aligned: Path, lox: Path, finetuned: Path) -> Models:
    """Open all three and pair their tensors; reads headers only. Raises CheckpointError with all problems."""
    problems = Problems()
    opened: dict[str, Checkpoint] = {}
    for side, path in zip(SIDES, (aligned, lox, finetuned), strict=True):
        if is_adapter(path):
            problems.input.append(
                f"{side}: {printable(path)}: is an adapter, expected a model. Merge it first: lox-stream apply"
            )
        elif (checkpoint := problems.open(path, side)) is not None:
            opened[side] = checkpoint
            problems.input += _plain_problems(side, checkpoint)
    problems.input += _same_problems(opened)
    problems.throw()
    own = [info for shard in opened["aligned"].shards for info in shard.tensors]
    names = [info.name for info in own if info.dtype in FLOATS and info.n_bytes]
    partners, warnings = {}, [told for one in opened.values() for told in one.warnings if ITSELF not in told]
    for side in SIDES[1:]:
        partners[side], found, told = _partners(side, opened[side], opened["aligned"], names)
        problems.input += found
        warnings += told
    problems.throw()
    tied = tied_names(opened["aligned"])
    triples = {
        name: Triple(opened["aligned"].tensors[name], partners["lox"][name], partners["finetuned"][name], name in tied)
        for name in names
    }
    return Models(opened["aligned"], opened["lox"], opened["finetuned"], triples, tuple(warnings))


def _same_problems(opened: Mapping[str, Checkpoint]) -> Iterator[str]:
    for (side, one), (other_side, other) in combinations(opened.items(), 2):
        if {shard.path for shard in one.shards} == {shard.path for shard in other.shards}:
            yield (
                f"{side} and {other_side} are the same files: {printable(one.root)} and {printable(other.root)}; "
                "expected three different models"
            )


def _plain_problems(side: str, checkpoint: Checkpoint) -> list[str]:
    """What is no plain weight: quantised, or of a dtype that is not computed with."""
    schemes = quantised_tensors(checkpoint) | dict.fromkeys(scaled_weights(checkpoint), "FP8")
    odd = {info.name: info.dtype for info in checkpoint.tensors.values() if info.dtype not in FLOATS | INTEGERS}
    found = odd | schemes
    if not found:
        return quantisation_problems(side, checkpoint, {}, ())
    return [
        f"{side}: {printable(checkpoint.root)}: {', '.join(sorted({*found.values()}))} in {listing(found)}; expected "
        f"{PLAIN}, and integers. De-quantise the model first"
    ]


def _partners(
    side: str, other: Checkpoint, aligned: Checkpoint, names: Sequence[str]
) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """What another model calls aligned's tensors, and all problems, and warnings; names and shapes have to agree."""
    pairs = pair(other, aligned, names, ())
    found = {name: partner for name, partner in pairs.partners.items() if partner is not None}
    missing = [name for name in names if name not in found]
    tied = tied_names(other)
    extra = [name for name in pairs.unused if other.tensors[name].dtype in FLOATS and name not in tied]
    shapes = [
        f"{printable(name)}: aligned is {aligned.tensors[name].shape}, {side} is {partner.shape}"
        for name, partner in found.items()
        if partner.shape != aligned.tensors[name].shape
    ]
    kinds = [name for name, partner in found.items() if partner.dtype not in FLOATS]
    root, way_out = f"{side}: {printable(other.root)}", "Give models that were made from aligned"
    problems = []
    if missing:
        problems.append(
            f"{root}: lacks {counted(len(missing), 'tensor')}: {listing(missing)}; expected each. {way_out}"
        )
    if extra:
        problems.append(f"{root}: has {listing(extra)}, expected no weight that aligned has not. {way_out}")
    if shapes:
        rest = f" and {len(shapes) - 4} more" if len(shapes) > 4 else ""
        problems.append(f"{'; '.join(shapes[:4])}{rest}; expected the same shapes. {way_out}")
    if kinds:
        problems.append(f"{root}: {listing(kinds)} hold integers, expected {PLAIN}, as in aligned. {way_out}")
    told = [f"{root}: its names have other prefixes than aligned's, and were paired without them"] * pairs.across
    return found, problems, told


def plan_point(models: Models, x: float, y: float, c: float, out: Path, options: Options) -> Plan:
    """The plan of the model at (x, y), which goes on where `out` holds some of it; reads headers only.

    Raises LoxError of some kind, with all that is wrong with `out`.
    """
    problems = Problems()
    roots = {side: checkpoint.root for side, checkpoint in models.sides.items()}
    resume = (out / JOURNAL).exists()
    problems.output, warnings = output_problems(out, roots, models.aligned, resume=resume, overwrite=False)
    if not problems.output:
        files = {side: input_files(checkpoint) for side, checkpoint in models.sides.items()}
        problems.output += linked_problems(out, files)
    companions = [companion_path(models.aligned, relative) for relative in models.aligned.companions]
    problems.input += companion_problems(companions)
    problems.throw()
    steps = tuple(_step(info, models.triples.get(info.name), x - c * y, y) for info in _tensors(models.aligned))
    point = Point(models.finetuned, x, y)
    return Plan(
        models.lox, models.aligned, models.aligned, out, options, steps, (*models.warnings, *warnings), point=point
    )


def measured_steps(models: Models) -> list[Step]:
    """A step for each tensor whose differences are summed."""
    return [
        Step(one.aligned.name, one.aligned, None, "blend", "landscape", blend=((1.0, one.lox), (1.0, one.finetuned)))
        for one in models.triples.values()
        if not one.follows
    ]


def _tensors(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    return (info for shard in checkpoint.shards for info in shard.tensors)


def _step(info: TensorInfo, triple: Triple | None, along: float, across: float) -> Step:
    if triple is None:
        return Step(info.name, info, None, "copy", "integer" if info.dtype in INTEGERS else "empty")
    both = ((along, triple.lox), (across, triple.finetuned))
    blend = tuple((factor, other) for factor, other in both if factor)
    return Step(info.name, info, None, "blend" if blend else "copy", "landscape", blend=blend)
