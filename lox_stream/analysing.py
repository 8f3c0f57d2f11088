"""`analyze`: what the difference of a pair is made of, matrix by matrix, in one streamed pass over it.

The pipeline is that of a run; what it does with a tensor is another thing. Nothing is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_stream.adapters import is_adapter
from lox_stream.analysed import Finding
from lox_stream.api import Progress, Reporter
from lox_stream.errors import CheckpointError, MemoryBudgetError, OptionError
from lox_stream.examining import Asked, examined, examining_bytes
from lox_stream.hub import local
from lox_stream.kernels.cpu import Run
from lox_stream.looking import look_at
from lox_stream.matching import Step
from lox_stream.names import in_quotes, listing, printable, shown
from lox_stream.options import Options, check_platform
from lox_stream.planning import DEFAULTS, plan

VALUES = 32  # leading singular values
RANKS = (1, 3, 6, 12)
ALPHAS = (0.25, 0.5, 1.0, 1.25, 2.0)
MOST_VALUES = 256
CHANGING = ("extrapolate", "rescale")  # a rescaling comes with its weight


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found of a pair."""

    base: Path
    aligned: Path
    finetuned: Path | None
    asked: Asked
    findings: tuple[Finding, ...]  # in the order of aligned's files
    copied: Mapping[str, str]  # tensors that a run would copy, and why
    warnings: tuple[str, ...]  # complete messages
    elapsed_s: float


def analyze(
    base: str | Path,
    aligned: str | Path,
    *,
    finetuned: str | Path | None = None,
    options: Options = DEFAULTS,
    values: int = VALUES,
    ranks: Sequence[int] = RANKS,
    alphas: Sequence[float] = ALPHAS,
    reference: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Analysis:
    """Measure what W_aligned - W_base is made of, matrix by matrix. Nothing is written.

    `finetuned` is a model that was fine-tuned from aligned, or its LoRA adapter: how much it left of the leading
    subspace. `values` leading singular values are given of each matrix. `ranks` and `alphas` span the grid of updates
    whose rounding is measured; those of `options` are in it, too. `reference` adds the robustness metrics as the
    paper's code has them, which is done for a `finetuned` model in any case. Names on the hub are downloaded.

    Memory is bounded as in a run, and the CPU computes all of it. Raises LoxError of some kind, and Cancelled where
    `cancel` is set.

        from lox_stream import analyze

        for one in analyze("base", "aligned").findings:
            print(one.name, one.relative, one.spectrum and one.spectrum.energy(6))
    """
    started = time.monotonic()
    check_platform()
    asked = _asked(options, values, ranks, alphas, reference=reference or finetuned is not None)
    pair = local(base), local(aligned)
    made = plan(*pair, options=asked.options)
    steps = [step for step in made.steps if step.action in CHANGING]
    if not steps:
        raise OptionError("there is no matrix that a run would extrapolate, expected one at least")
    _require_memory(steps, asked)
    later: dict[str, Step] = {}
    told: tuple[str, ...] = ()
    if finetuned is not None:
        later, told = _later(pair, local(finetuned), asked.options, steps)
    found = _examined(steps, later, asked, Reporter(steps, steps, progress, started), cancel)
    findings = tuple(one for step in steps for one in found.get(step.name, ()))
    return Analysis(
        made.base.root,
        made.aligned.root,
        None if finetuned is None else Path(finetuned),
        asked,
        findings,
        {step.name: step.reason for step in made.steps if step.action not in CHANGING},
        (*made.warnings, *told, *(notice for one in findings for notice in one.notices)),
        time.monotonic() - started,
    )


def _require_memory(steps: Sequence[Step], asked: Asked) -> None:
    """Raise MemoryBudgetError where the largest matrix alone takes more than it may."""
    needed = {step.name: examining_bytes(step, asked) for step in steps}
    worst = max(needed, key=lambda name: needed[name])
    if needed[worst] > asked.options.memory_bytes:
        raise MemoryBudgetError(
            f"{printable(worst)}: to look at it needs {needed[worst]} bytes of memory, the budget is "
            f"{asked.options.memory_bytes}. Allow it with --memory {-(-needed[worst] // (1 << 20))}MiB, or leave it "
            f"out with --skip {in_quotes(worst)}"
        )


def _asked(options: Options, values: int, ranks: Sequence[int], alphas: Sequence[float], *, reference: bool) -> Asked:
    """The grid with the run's own rank and alpha in it; raises OptionError."""
    problems = []
    if options.form != "weights" or options.part:
        problems.append("form and part are for what is written, expected Options without them")
    if options.alpha == 0:
        problems.append("--alpha 0: expected another factor, for it adds nothing. 1.25 is the paper's")
    if options.rank < 1:
        problems.append(f"--rank {options.rank}: expected 1 or more: full rank has no leading directions")
    if type(values) is not int or not 1 <= values <= MOST_VALUES:
        problems.append(f"--values {shown(values)}: expected 1 to {MOST_VALUES} singular values")
    if not _all(ranks, lambda rank: type(rank) is int and 1 <= rank <= MOST_VALUES):
        problems.append(f"--ranks {shown(ranks)}: expected numbers from 1 to {MOST_VALUES}")
    if not _all(alphas, lambda alpha: isinstance(alpha, (int, float)) and 0 < abs(alpha) <= 1e6):
        problems.append(f"--alphas {shown(alphas)}: expected numbers other than 0")
    if problems:
        raise OptionError("\n".join(problems))
    return Asked(
        replace(options, device="cpu"),
        values,
        tuple(sorted({*ranks, options.rank})),
        tuple(sorted({*map(float, alphas), options.alpha})),
        reference,
    )


def _all(values: object, is_one: Callable[[Any], bool]) -> bool:
    """Whether it is a sequence of such values; a library is given anything."""
    return isinstance(values, Sequence) and not isinstance(values, str) and all(map(is_one, values))


def _later(
    pair: tuple[Path, Path], finetuned: Path, options: Options, steps: Iterable[Step]
) -> tuple[dict[str, Step], tuple[str, ...]]:
    """Where the fine-tuned model has each matrix, by aligned's names; and what it lacks, in words."""
    base, aligned = pair
    lenient = replace(options, on_missing="copy", on_shape_mismatch="copy", scaling=None)
    if not is_adapter(finetuned):
        other = plan(base, finetuned, options=lenient)
    elif not is_adapter(aligned):
        other = plan(aligned, finetuned, options=lenient)
    else:
        problem = (
            "is an adapter, and aligned is one, too; expected one model at least. Merge aligned into its base first"
        )
        raise CheckpointError([f"{printable(finetuned)}: {problem}: lox-stream apply --alpha 0"])
    there = {step.name: step for step in other.steps}
    found, lost = {}, []
    for step in (step for step in steps if step.action == "extrapolate"):
        match = there.get(step.name)
        if match is not None and match.reason == "untouched":
            found[step.name] = step  # by an adapter, which leaves aligned's own
        elif match is not None and _same_matrices(step, match):
            found[step.name] = match
        else:
            lost.append(step.name)
    if not found:
        problem = "has none of the matrices of aligned, expected a model that was fine-tuned from it"
        raise CheckpointError([f"{printable(finetuned)}: {problem}"])
    told = [f"{printable(finetuned)}: without {listing(lost)}; these are left out of R_ft"] if lost else []
    return found, tuple(told)


def _same_matrices(step: Step, other: Step) -> bool:
    """Whether another model has the same matrices under a tensor's name."""
    return other.action in ("extrapolate", "merge") and (other.count, other.m, other.n) == (step.count, step.m, step.n)


def _examined(
    steps: Sequence[Step],
    later: Mapping[str, Step],
    asked: Asked,
    report: Reporter,
    cancel: threading.Event | None,
) -> dict[str, list[Finding]]:
    """What is found of each tensor, by its name."""
    found: dict[str, list[Finding]] = {}
    own = {step.name: step for step in steps}

    def look(step: Step, run: Run) -> None:
        if step.action == "extrapolate":
            found[step.name] = examined(own[step.name], later.get(step.name), asked, run)

    counted = [replace(step, rank=max(asked.rank, step.rank)) for step in steps]  # for the memory it takes
    look_at(counted, asked.options, look, report, cancel, lambda step: examining_bytes(step, asked))
    return found
