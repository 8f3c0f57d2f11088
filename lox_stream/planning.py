"""The plan: what will happen to each tensor and why. Finds all that is wrong before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lox_stream import costs
from lox_stream.adapters import Adapter, is_adapter, open_adapter, rescaled_to
from lox_stream.adapting import laid_over, match_adapter
from lox_stream.carrying import LeftOut, adapter_inputs, adapter_warnings, as_adapter
from lox_stream.checkpoint import DTYPE_BYTES, Checkpoint, companion_path, files_of, open_checkpoint, whence
from lox_stream.companions import companion_problems
from lox_stream.errors import CheckpointError, LoxError, MemoryBudgetError, OptionError, OutputError
from lox_stream.fused import Part
from lox_stream.layout import read_json
from lox_stream.matching import Step, glob_problems, match, output_bytes, with_fresh_scales
from lox_stream.names import in_quotes, listing, place_name, printable
from lox_stream.options import Options, check_options, check_ways, gpu_count, is_gpu, to_json
from lox_stream.output_rules import is_finished, is_new, linked_problems, output_problems
from lox_stream.output_rules import output_names as names_written
from lox_stream.quantisation import quantised_tensors
from lox_stream.regions import matrix_count, parts_of_each
from lox_stream.rewriting import output_dtypes, rewritten
from lox_stream.shards import unreadable
from lox_stream.sharing import folder_of_part, own_share, part_problems, place_problems

__all__ = ["Options", "Plan", "Step", "check_options", "memory_needed", "output_names", "plan", "plan_summary"]

DEFAULTS = Options()
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class Point:
    """Where in a landscape a model lies: the plan's base is the LoX model there, and this is the third one."""

    finetuned: Checkpoint
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run does, in the order in which it reads."""

    base: Checkpoint
    aligned: Checkpoint
    written: Checkpoint  # aligned with the files and dtypes of the output; aligned itself where these are the same
    out: Path | None  # None: nothing is written (stream)
    options: Options
    steps: tuple[Step, ...]  # by aligned's shards and offsets, so that reading is sequential
    warnings: tuple[str, ...]  # complete messages
    left_out: tuple[LeftOut, ...] = ()  # of an adapter: what it cannot carry
    point: Point | None = None  # of a landscape


def inputs_of(plan: Plan) -> dict[str, Checkpoint]:
    """All that a run reads, by what the journal and the manifest call it."""
    found = {"base": plan.base, "aligned": plan.aligned}
    return found if plan.point is None else found | {"finetuned": plan.point.finetuned}


def plan(
    base: str | Path,
    aligned: str | Path,
    out: str | Path | None = None,
    *,
    options: Options = DEFAULTS,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    dry: bool = False,
) -> Plan:
    """Open both checkpoints, pair them, and check the output folder; reads headers only and writes nothing.

    `dry`: it will not be carried out here, so that too little space is a warning.

    Raises OptionError at once for options that mean nothing. All other problems are collected and raised together, as
    CheckpointError, or as OutputError, OptionError or MemoryBudgetError where all of them are of that one kind.
    """
    check_options(options)
    check_ways(resume=resume, overwrite=overwrite, repair=repair)
    problems = Problems()
    target = Path(out).absolute() if out is not None else None
    opened_base = problems.open(base, "base")
    adapter, opened_aligned = None, None
    if not is_adapter(aligned):
        opened_aligned = problems.open(aligned, "aligned")
    elif (adapter := problems.open_adapter(aligned, options.scaling)) is not None and opened_base is not None:
        opened_aligned = laid_over(opened_base, adapter)
    if options.scaling is not None and adapter is None and opened_aligned is not None:
        problems.option.append(
            f"scaling is {options.scaling}, which is for an adapter, and {printable(aligned)} is a model. Leave it out"
        )
    written: Checkpoint | None = None
    steps: tuple[Step, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    warnings: list[str] = []
    if opened_aligned is not None:
        if options.form != "weights":
            opened_aligned = replace(opened_aligned, companions=())
        written = rewritten(opened_aligned, output_dtypes(opened_aligned, options.dtype), options.max_shard_size)
        problems.option += [*glob_problems(opened_aligned, options), *_dtype_problems(opened_aligned, options)]
    if opened_base is not None and opened_aligned is not None and written is not None:
        if adapter is None:
            steps, found, warnings = match(opened_base, opened_aligned, options)
        else:
            steps, found, warnings = match_adapter(opened_base, adapter, options)
        problems.input += [*_same_problems(opened_base, opened_aligned), *found]
        steps = tuple(_as_written(step, written) for step in steps if step.name in written.tensors)
        if options.form == "weights":
            steps = with_fresh_scales(steps)
        else:
            written, steps, left_out, refused = as_adapter(opened_aligned, steps, options)
            problems.input += adapter_inputs(opened_aligned)
            problems.option += refused if not (problems.option or problems.input) else []
            warnings += adapter_warnings(steps, options)
        if options.part and target is not None:
            problems.option += part_problems(written, options)
            problems.output += place_problems(target, options.part)
            written, steps = own_share(written, steps, options.part)
            target = folder_of_part(target, options.part)
        problems.memory += _memory_problems(steps, options)
        warnings = [*_input_warnings(opened_base, opened_aligned), *warnings]
    if target is not None and not problems.output:
        roots = {
            "base": Path(base).absolute(),
            "adapter" if is_adapter(aligned) else "aligned": Path(aligned).absolute(),
        }
        found, more = output_problems(
            target, roots, written, resume=resume, overwrite=overwrite, repair=repair, dry=dry
        )
        problems.output += found
        warnings += more
        if opened_aligned is not None:
            paths = [companion_path(opened_aligned, relative) for relative in opened_aligned.companions]
            problems.input += companion_problems(paths)
        sides = {"base": opened_base, "aligned": opened_aligned}
        opened = {side: input_files(one) for side, one in sides.items() if one is not None}
        problems.output += linked_problems(target, opened) if not found else []
    problems.throw()
    assert opened_base is not None, "what cannot be opened is a problem"
    assert opened_aligned is not None, "what cannot be opened is a problem"
    assert written is not None, "it is made of aligned"
    return Plan(opened_base, opened_aligned, written, target, options, steps, tuple(warnings), left_out)


def plan_all(
    base: str | Path,
    aligned: str | Path,
    outputs: Sequence[tuple[str | Path, Options]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    repair: bool = False,
    dry: bool = False,
) -> list[Plan]:
    """A plan for each of several outputs of one pair (folders with their options), for `execute_all`.

    As `plan`, but one that is finished already is no reason not to resume the others, nor one that is not there to
    repair them.
    """
    for _, options in outputs:
        check_options(options)
    in_parts = any(options.part for _, options in outputs)
    several = resume and (len(outputs) > 1 or in_parts)
    places = [folder_of_part(Path(out), options.part) for out, options in outputs]
    finished = [several and is_finished(place) for place in places]
    going = in_parts or not all(finished)
    return [
        plan(
            *(base, aligned, out),
            options=options,
            resume=resume,
            overwrite=overwrite,
            repair=(repair and not (several and is_new(place))) or (done and going),  # whose rules let it be
            dry=dry,
        )
        for (out, options), place, done in zip(outputs, places, finished, strict=True)
    ]


def input_files(checkpoint: Checkpoint) -> list[Path]:
    """All that is read of an input."""
    companions = [companion_path(checkpoint, relative) for relative in checkpoint.companions]
    return [*(shard.path for shard in (*checkpoint.shards, *files_of(checkpoint))), *companions]


def _as_written(step: Step, written: Checkpoint) -> Step:
    dtype = written.tensors[step.name].dtype
    return step if dtype == step.aligned.dtype else replace(step, dtype=dtype)


def memory_needed(step: Step, options: Options) -> int:
    """Bytes of our own buffers that a step needs at most, for the matrices that it solves at once.

    0 for a copy, and for what a GPU computes; a change by factors is computed by the CPU always.
    """
    if step.factors is not None:
        return costs.factors_bytes(step.m, step.n, step.factors.rank)
    if step.action != "extrapolate":
        return 0
    return max(_memory_for(part, step, options) for part in parts_of_each(step)) + _wide_bytes(step) + _taken(step)


def steps_together(step: Step, options: Options) -> int:
    """How many steps like this one make a job."""
    if step.action != "extrapolate" or step.parts or step.factors is not None:
        return 1
    return costs.together(step.m, step.n, step.rank, options.svd, options.memory_bytes) // step.count


def _taken(step: Step) -> int:
    """Of an adapter: the factors as they are stored, twice; and delta itself where that has no more than their rank."""
    whole = step.m * step.n if step.rank >= min(step.m, step.n) else 0
    return sum(info.n_bytes for pair in step.pairs for info in (pair.a, pair.b)) * 2 + bool(step.pairs) * whole * 8


def _wide_bytes(step: Step) -> int:
    """Of weights of FP8: each side in float32, and where the output is of FP8 too the result."""
    sides = (step.scaled is not None) * (1 if step.dtype else 2) + (step.base_scaled is not None)
    return sides * step.m * step.n * DTYPE_BYTES["F32"]


def _sizes(step: Step) -> tuple[int, int]:
    """Bytes of an element of either side, as it is computed with."""
    assert step.base is not None, "planning pairs every tensor that is extrapolated"
    wide = DTYPE_BYTES["F32"]
    return (
        wide if step.scaled else DTYPE_BYTES[step.aligned.dtype],
        wide if step.base_scaled else DTYPE_BYTES[step.base.dtype],
    )


def _memory_for(part: Part, step: Step, options: Options) -> int:
    """Bytes for solving such parts of a step, and where they lie scattered for their copies, and for the output."""
    at_once = costs.together(part.m, part.n, step.rank, options.svd, options.memory_bytes)
    at_once = min(at_once, step.count * len(parts_of_each(step)))
    away = is_gpu(options.device) and _card_memory_for(part, step, options.svd, False)
    solving = 0 if away else at_once * costs.step_bytes(part.m, part.n, step.rank, options.svd)
    if part.groups == 1 or step.base is None:
        return solving
    wholes = 1 + -(-(at_once - 1) // len(step.parts))
    size = DTYPE_BYTES[step.dtype or step.aligned.dtype]
    return solving + at_once * part.m * part.n * sum(_sizes(step)) + wholes * step.m * step.n * size


def card_memory_needed(step: Step, svd: str, *, blocks: bool = False) -> int:
    """Bytes of a GPU that a matrix of a step takes where there is one; 0 for what the CPU computes all the same.

    `blocks`: in the smallest blocks that it can be cut into.
    """
    if step.action != "extrapolate":
        return 0
    return max(_card_memory_for(part, step, svd, blocks) for part in parts_of_each(step))


def _card_memory_for(part: Part, step: Step, svd: str, blocks: bool) -> int:
    if step.base is None or step.dtype or "F64" in (step.aligned.dtype, step.base.dtype):
        return 0
    if not costs.goes_on_card(part.m, part.n, step.rank, svd):
        return 0
    sizes = _sizes(step)
    rows = costs.part_rows(part.m, part.n) if blocks else 0
    return costs.bytes_on_card(part.m, part.n, step.rank, sizes, rows)


def too_large(steps: Sequence[Step], svd: str, usable_bytes: float) -> str:
    """The worst matrix that a GPU cannot take in so many bytes, in words; nothing if it can take them all."""
    needed = {step.name: card_memory_needed(step, svd, blocks=True) for step in steps}
    over = [step for step in steps if needed[step.name] > usable_bytes]
    if not over:
        return ""
    worst = max(over, key=lambda step: needed[step.name])
    others = f" (and {len(over) - 1} more tensors exceed it)" if len(over) > 1 else ""
    return (
        f"{printable(worst.name)} {(worst.m, worst.n)} takes {needed[worst.name]} bytes of GPU memory in the smallest "
        f"blocks, expected at most the {usable_bytes:.0f} that may be used{others}. Free some, or give it more: "
        f"--gpu-memory {-(-needed[worst.name] // (1 << 20))}MiB"
    )


def output_names(plan_or_aligned: Plan | Checkpoint) -> tuple[str, ...]:
    """Every name that a run writes in its folder, relative to it, the temporary ones too."""
    return names_written(plan_or_aligned.written if isinstance(plan_or_aligned, Plan) else plan_or_aligned)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able data: inputs, options, each step, totals in tensors and bytes, warnings."""
    changed, copied, rescaled, merged = (
        [output_bytes(step) for step in plan.steps if step.action == action]
        for action in ("extrapolate", "copy", "rescale", "merge")
    )
    return {
        "base": whence(plan.base),
        "aligned": whence(plan.aligned),
        "out": place_name(plan.out) if plan.out is not None else None,
        "options": to_json(plan.options),
        "steps": [_step_summary(step, plan.options) for step in plan.steps],
        "totals": {
            "tensors": len(plan.steps),
            "bytes": sum(changed) + sum(copied) + sum(rescaled) + sum(merged),
            "extrapolated_tensors": len(changed),
            "extrapolated_bytes": sum(changed),
            "copied_tensors": len(copied),
            "copied_bytes": sum(copied),
            "rescaled_tensors": len(rescaled),
            "rescaled_bytes": sum(rescaled),
            "merged_tensors": len(merged),
            "merged_bytes": sum(merged),
            "shards": len(plan.written.shards),
            "companions": len(plan.aligned.companions),
        },
        "left_out": [asdict(one) for one in plan.left_out],
        "warnings": list(plan.warnings),
    }


def _step_summary(step: Step, options: Options) -> dict[str, Any]:
    base = step.base if step.factors is None else step.aligned
    said: dict[str, Any] = {}
    if step.factors is not None:
        said["factors"] = {"rank": step.factors.rank, "scaling": step.factors.scaling}
    if step.pairs:
        said["modules"] = [pair.parameter or pair.module for pair in step.pairs]
    return {
        "name": step.name,
        "action": step.action,
        "reason": step.reason,
        "shape": list(step.aligned.shape),
        "dtype": step.aligned.dtype,
        "bytes": step.aligned.n_bytes,
        "written_dtype": step.dtype or step.aligned.dtype,
        "written_bytes": output_bytes(step),
        "base_name": base.name if base is not None else None,
        "base_dtype": base.dtype if base is not None else None,
        "rank": step.rank if step.action == "extrapolate" else None,
        "matrices": matrix_count(step) if step.action == "extrapolate" else 0,
        "parts": [part.label for part in step.parts],
        "memory_bytes": memory_needed(step, options),
        **said,
    }


@dataclass(slots=True)
class Problems:
    """Complete messages, kept apart by kind so that the error raised says what kind it is."""

    input: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    option: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)

    def open(self, path: str | Path, side: str) -> Checkpoint | None:
        """The checkpoint, or None and its problems noted."""
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            problems: Sequence[str] = error.problems
        except OSError as error:
            problems = [unreadable(Path(error.filename or path), error)]
        self.input += [f"{side}: {problem}" for problem in problems]
        return None

    def open_adapter(self, path: str | Path, scaling: float | None) -> Adapter | None:
        """The same of an adapter, with a scaling of its factors in place of its own."""
        try:
            adapter = open_adapter(path)
            return adapter if scaling is None else rescaled_to(adapter, scaling)
        except CheckpointError as error:
            self.input += [f"adapter: {problem}" for problem in error.problems]
            return None

    def throw(self) -> None:
        """Raise all problems in one error, of their own kind where there is only one kind."""
        everything = [*self.option, *self.input, *self.memory, *self.output]
        kinds: dict[type[LoxError], list[str]] = {
            OptionError: self.option,
            MemoryBudgetError: self.memory,
            OutputError: self.output,
        }
        for kind, problems in kinds.items():
            if problems and len(problems) == len(everything):
                raise kind("\n".join(problems))
        if everything:
            raise CheckpointError(everything)


def _same_problems(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    """The two sides are one: the same folder, or links to the same files."""
    if {shard.path for shard in base.shards} != {shard.path for shard in files_of(aligned)}:
        return []
    return [
        f"base and aligned are the same files: {printable(base.root)} and {printable(aligned.root)}; "
        "expected two different models: the one before and the one after alignment"
    ]


def _dtype_problems(aligned: Checkpoint, options: Options) -> list[str]:
    """A plain checkpoint is asked for, and some of its weights would stay quantised."""
    left = {} if options.dtype == "same" else quantised_tensors(aligned)
    if not left:
        return []
    kinds = " and ".join(dict.fromkeys(left.values()))
    return [
        f"--dtype {options.dtype}: aligned holds quantised tensors that cannot be taken apart here ({kinds}): "
        f"{listing(left)}; expected floats, or FP8 matrices with one scale of a shape that fits. De-quantise the "
        "checkpoint first, or leave --dtype out"
    ]


def _memory_problems(steps: tuple[Step, ...], options: Options) -> list[str]:
    """One message, about the tensor that needs most, for all that exceed the budget."""
    pinned = costs.PINNED_BYTES * gpu_count(options.device)
    if pinned > options.memory_bytes and any(card_memory_needed(step, options.svd) for step in steps):
        return [
            f"--device {options.device}: copies to and from it take {pinned} bytes of memory, the budget is "
            f"{options.memory_bytes}. Allow it with --memory {-(-pinned // (1 << 20))}MiB"
        ]
    needed = {step.name: memory_needed(step, options) for step in steps}
    over = sorted((name for name in needed if needed[name] > options.memory_bytes), key=lambda name: -needed[name])
    if not over:
        return []
    most = needed[over[0]]
    others = f" (and {len(over) - 1} more tensors exceed it)" if len(over) > 1 else ""
    ways = [f"--memory {-(-most // (1 << 20))}MiB", *(["--svd randomized"] if options.svd == "exact" else [])]
    return [
        f"{printable(over[0])}: needs {most} bytes of memory, the budget is {options.memory_bytes}{others}. "
        f"Allow it with {' or '.join(ways)}, or copy it unchanged with --skip {in_quotes(over[0])}"
    ]


def _input_warnings(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    warnings = [*base.warnings, *aligned.warnings]
    if aligned.companions and _has_chat_template(base) and not _has_chat_template(aligned):
        warnings.append(
            f"{printable(base.root)} (base) has a chat template and {printable(aligned.root)} (aligned) has none: "
            "are the two swapped?"
        )
    return warnings


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether a file of its own or the tokenizer's config holds one."""
    names = {path.as_posix() for path in checkpoint.companions}
    if names & set(_CHAT_TEMPLATES):
        return True
    if "tokenizer_config.json" not in names:
        return False
    try:
        return bool(read_json(companion_path(checkpoint, Path("tokenizer_config.json"))).get("chat_template"))
    except CheckpointError:
        return False  # a tokenizer that cannot be read is the model's affair; it is copied as it is
