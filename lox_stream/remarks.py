"""What a person should know of a finished run, each a complete message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lox_stream.facts import TensorFacts
from lox_stream.manifest import made_for, totals
from lox_stream.model_card import LOW_RETENTION
from lox_stream.names import counted, listing, printable
from lox_stream.options import Options
from lox_stream.planning import Plan
from lox_stream.resuming import Survey


def changed_bytes(survey: Survey | None, finished: Mapping[str, TensorFacts]) -> tuple[str, ...]:
    """A message for the tensors that a repair did not give their old bytes."""
    sums = survey.checksums if survey is not None else {}
    other = [name for name, checksum in sums.items() if finished[name].checksum != checksum]
    if not other:
        return ()
    return (
        f"made again with other bytes than before: {listing(other)}. They are right, but their last bits come from "
        "another version or processor, or from other weights in the inputs; the manifest has their checksums",
    )


def plan_warnings(plan: Plan) -> tuple[str, ...]:
    """That an adapter of lox-stream is merged into another model than it was made for; reads samples of that one."""
    overlay = plan.aligned.overlay
    if overlay is None or made_for(overlay.folder, plan.base) is not False:
        return ()
    return (
        f"{printable(overlay.folder)}: was made for another model than {printable(plan.base.root)}: size, header or a "
        "sample of the weights differ from those that its manifest names. Is it the right one?",
    )


def run_warnings(finished: Iterable[TensorFacts], options: Options) -> tuple[str, ...]:
    """What a person should know of the finished tensors, each a complete message."""
    rows = sorted(finished, key=lambda facts: facts.name)
    total = totals(rows)
    warnings = [notice for facts in rows for notice in facts.notices]
    if len(warnings) > 6:
        warnings = [*warnings[:5], f"... and {len(warnings) - 5} more tensors like these; the manifest names them all"]
    if total.retention is not None and total.retention < LOW_RETENTION and options.rounding == "nearest":
        warnings.append(
            f"only {total.retention:.0%} of the update survives the rounding to the output's dtype: most of its "
            "elements are smaller than half a step. Keep all of it on average with --rounding stochastic"
        )
    if total.identical and not total.extrapolated:
        warnings.append(
            f"base and aligned hold the same weights: {counted(total.identical, 'tensor')} copied, none extrapolated. "
            "Is one of the two the wrong model?"
        )
    idle = [facts.name for facts in rows if facts.reason == "no change"]
    if idle and len(idle) == total.merged + total.extrapolated:
        warnings.append(
            f"the adapter changes nothing: of its {counted(len(idle), 'module')} the factors, or what they are taken "
            "times, are zero. Is it one that was trained, and alpha what it should be?"
        )
    if total.not_unique:
        warnings.append(
            f"{counted(len(total.not_unique), 'tensor')} without a gap after singular value {options.rank}: the rank-"
            f"{options.rank} part is one of many equally good ones ({printable(total.not_unique[0])}, ...)"
        )
    if total.not_converged:
        warnings.append(
            f"{counted(len(total.not_converged), 'tensor')} did not reach the tolerance {options.tolerance:g} "
            f"({printable(total.not_converged[0])}, ...). Check them with --svd exact, or choose another rank"
        )
    return tuple(warnings)
