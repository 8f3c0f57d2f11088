"""Models between base and aligned: base + rank-k part of (aligned - base), for several k, in one pass over the pair.

They find the effective rank of the safety subspace as the paper means it: the smallest k at which such a model is as
safe as aligned. Base + Proj_k(aligned - base) is a run from aligned back to base with alpha -1, so each is an output
like any other; what is no matrix, and the files beside the weights, are base's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lox_stream.adapters import is_adapter
from lox_stream.api import Progress, Summary, execute_all
from lox_stream.errors import LoxError, OptionError, OutputError, reworded
from lox_stream.hub import local
from lox_stream.names import printable, shown
from lox_stream.options import Options
from lox_stream.output_rules import JOURNAL, is_finished
from lox_stream.planning import DEFAULTS, Plan, plan_all

PLACEHOLDER = "{k}"
OTHER = {"base": "aligned", "aligned": "base"}  # in the plan's words
RANKS = (0, 1, 2, 3, 4, 6, 8)  # those that the paper's code tries


def rungs(out: str, ranks: Sequence[int], options: Options = DEFAULTS) -> list[tuple[Path, Options]]:
    """The folder and the options of each model; raises OptionError. `out` holds `{k}`; 0 is base itself."""
    problems = []
    if PLACEHOLDER not in out:
        problems.append(
            f"--ladder is {printable(out)}, expected {PLACEHOLDER} in it: each rank has a folder of its own"
        )
    if not ranks or len({*ranks}) < len(ranks) or not all(type(k) is int and k >= 0 for k in ranks):
        problems.append(f"the ladder's ranks are {shown(list(ranks))}, expected numbers from 0, each once")
    if options.recipe:
        problems.append("a ladder and a recipe are both given, expected one: the ladder's ranks are for all matrices")
    if options.rename or options.on_missing != "error" or options.on_shape_mismatch != "error":
        problems.append(
            "a ladder, and --rename, --on-missing or --on-shape-mismatch, are given; expected one: it is for models of "
            "the same names and shapes"
        )
    if problems:
        raise OptionError("\n".join(problems))
    common = replace(options, form="weights", solved_for=0.0)
    return [
        (Path(out.replace(PLACEHOLDER, str(k))), replace(common, rank=k or 1, alpha=-1.0 if k else 0.0)) for k in ranks
    ]


def is_begun(out: str, ranks: Sequence[int]) -> bool:
    """Whether some of the folders hold a run that goes on."""
    return any((Path(out.replace(PLACEHOLDER, str(k))) / JOURNAL).exists() for k in ranks)


def plan_ladder(
    base: str | Path,
    aligned: str | Path,
    out: str,
    ranks: Sequence[int] = RANKS,
    *,
    options: Options = DEFAULTS,
    resume: bool = False,
) -> list[Plan]:
    """The plans of all models, for `execute_all`. Raises LoxError of some kind."""
    outputs = rungs(out, ranks, options)
    first, last = local(base), local(aligned)
    for side in (first, last):
        if is_adapter(side):
            raise OptionError(
                f"{printable(side)}: is an adapter, expected a model for a ladder. Merge it first: lox-stream apply "
                "--alpha 0"
            )
    done = [folder for folder, _ in outputs if not resume and is_finished(folder)]
    if done:
        raise OutputError(
            f"{printable(done[0])}: holds a finished model, expected a new or empty folder. Choose another"
        )
    try:
        plans = plan_all(last, first, outputs, resume=resume)
    except LoxError as error:
        raise reworded(error, re.sub(r"\b(base|aligned)\b", lambda side: OTHER[side[1]], str(error))) from error
    return [
        replace(plan, warnings=tuple(one for one in plan.warnings if not one.startswith("alpha is"))) for plan in plans
    ]


def climb(
    base: str | Path,
    aligned: str | Path,
    out: str,
    ranks: Sequence[int] = RANKS,
    *,
    options: Options = DEFAULTS,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> list[Summary]:
    """Write base + rank-k part of (aligned - base) for each k, into `out` with `{k}` replaced; one pass over the pair.

    from lox_stream.ladder import climb

    climb("base", "aligned", "ladder-{k}", ranks=(0, 3, 6))
    """
    plans = plan_ladder(base, aligned, out, ranks, options=options, resume=resume)
    return execute_all(plans, resume=resume, progress=progress, cancel=cancel)
